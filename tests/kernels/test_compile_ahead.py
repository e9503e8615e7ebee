"""The gate for GPUs that are not there: every program compiles, and to what it should."""

import json
import os
import subprocess
import sys

import pytest
from sampler_kernels.opcodes import DIV_TABLE, FIRST, MUL_TABLE


@pytest.fixture(scope="module")
def printed():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_ahead"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(printed):
    return [line for line in printed if "kernel" in line]


def aligned(compiled, kernel):
    """The kernels whose rows are a multiple of 16 elements: all but the odd one at the end."""
    return [k for k in compiled if k["kernel"] == kernel][
        : -2 if kernel == "formula_kernel" else None
    ]


def test_every_program_compiles_without_spills_or_contraction(compiled):
    assert {k["arch"] for k in compiled} == {80, 90}
    assert {k["kernel"] for k in compiled} == {"formula_kernel", "gram_kernel", "scalar_kernel"}
    for k in compiled:
        assert k["spilled"] == 0 and k["registers"] <= 128, k
        assert k["fused"] == 0, k


def test_latents_move_in_16_byte_accesses(compiled):
    """8 elements per thread: one access of 16 bytes in half precision, two in float32."""
    for k in aligned(compiled, "formula_kernel") + aligned(compiled, "gram_kernel"):
        wide = sum(2 if d == "torch.float32" else 1 for d in k["inputs"])
        table = [
            b for op, b in zip(k["code"][::3], k["code"][2::3]) if op in (MUL_TABLE, DIV_TABLE)
        ]
        assert k["loads"].count("ld.global.v4.b32") == wide, k
        firsts = k["code"][::3].count(FIRST)
        assert len(k["loads"]) <= wide + len(table) + firsts, k
        wide = sum(2 if d == "torch.float32" else 1 for d in k["outputs"])
        stores = ["st.global.v4.b32"] * wide + ["st.global.b32"] * k["pairs"]
        assert k["stores"] == stores, k


def test_reductions_are_compiled_alone_and_with_a_step(compiled):
    found = {bool(k["outputs"]) for k in compiled if k["kernel"] == "gram_kernel"}
    assert found == {True, False}


def test_every_rounding_is_to_nearest(compiled):
    found = {r for k in compiled for r in k["roundings"]}
    assert not [r for r in found if ".approx" in r or ".rz" in r or ".full" in r], found
    for dtype, cast in (("torch.float16", "f16"), ("torch.bfloat16", "bf16")):
        stores = [k for k in compiled if k["outputs"] == [dtype]]
        assert len(stores) == 2
        assert all(any(f"cvt.rn.{cast}" in r for r in k["roundings"]) for k in stores), stores


def test_all_batch_sizes_share_programs(printed):
    """Triton specializes on arguments that are 1 or divisible by 16; `rows` is excepted."""
    single, *others = [line["programs"] for line in printed if "rows" in line]
    assert single and len(others) == 2 and all(programs == single for programs in others)
