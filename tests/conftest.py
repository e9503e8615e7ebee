"""Shared by all tests: offline, one thread, and Triton's interpreter where there is no GPU.

The environment is set before anything imports torch, triton or the Hugging Face libraries.
"""

import gc
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

# Temporary folders in memory where there is some: runs flush every file, and a disk takes its time.
MEMORY = "/dev/shm"
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 8 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

torch.set_num_threads(1)
# The first call after a fork replaces torch's thread pool, and two threads that make it at once
# race (pytorch's "Invalid thread pool!"): tests fork, and transformers reads weights on threads.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Spare the garbage collector what is loaded once: going over it was a tenth of the time.

    While modules are imported it finds next to nothing, and took a quarter of the collection.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)  # 700 by default: a tenth of the time of tests again
        gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # what is left at the end of the interpreter would be reported as leaked


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords have the names of folders too
            item.add_marker(skip)
