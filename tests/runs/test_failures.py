"""The failure policy, row by row: memory, numbers, exceptions, disks, signals."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sampler.core import durable
from sampler.core.errors import SamplerError
from sampler.runs import metadata, png
from sampler.runs.folder import OutputOptions
from sampler.runs.store import LocalStore
from sampler.runs.writer import ImageWriter, WriteItem
from sampler.workers.batch_runner import BatchRunner
from sampler.workers.execute import raise_for
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.recovery import is_out_of_memory
from sampler.workers.work import WorkOptions
from tests.processes import Forked
from tests.runs.stub import SCHEDULE, engine, is_intact, make, pictures, prompts

TABLE = prompts(8)
assert SCHEDULE


def errors(run):
    return {
        e["index"]: e["error"] for e in run.results().entries.values() if e["status"] == "error"
    }


def too_many(rows):
    """A device that takes this many rows of cond and uncond."""

    def trouble(adapter, x, cond):
        if x.shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    return trouble


def test_out_of_memory_halves_the_batch_and_remembers(tmp_path):
    whole, _ = make(tmp_path / "whole", TABLE, batch_size=8)
    made = engine(trouble=too_many(4))
    run, tally = make(tmp_path / "run", TABLE, made, batch_size=8)
    assert (tally.done, tally.failed) == (8, 0)
    assert run.results().micro == {0: 2}
    assert {entry["micro"] for entry in run.results().entries.values()} == {2}
    assert pictures(tmp_path / "run") == pictures(tmp_path / "whole"), "this network rounds alike"
    (tmp_path / "run/images" / sorted(pictures(tmp_path / "run"))[0]).unlink()
    again = engine(trouble=too_many(4))
    make(tmp_path / "run", TABLE, again, batch_size=8)
    assert max(again.pipeline.batches) == 4, "the recorded size is used at once"


def test_out_of_memory_with_one_image_is_its_error(tmp_path):
    run, tally = make(tmp_path / "run", TABLE, engine(trouble=too_many(0)))
    assert tally.failed == 8 and errors(run)[0]["code"] == "oom"
    with pytest.raises(SamplerError) as caught:
        raise_for(tally, "run")
    assert caught.value.code == 7


def test_out_of_memory_may_fail_the_batch(tmp_path):
    options = WorkOptions(on_oom="fail")
    run, tally = make(tmp_path / "run", TABLE, engine(trouble=too_many(4)), batch_size=8,
                      work_options=options)  # fmt: skip
    assert tally.failed == tally.oom == 8 and not run.results().micro
    _, tally = make(
        tmp_path / "run", TABLE, batch_size=8, work_options=WorkOptions(retry_errors=True)
    )
    assert (tally.done, tally.failed) == (8, 0)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(
        ValueError("out of memory")
    )


def only(number, action):
    """Trouble for the row of `picture number` alone, wherever it stands in a batch."""
    marked = sum(map(ord, f"picture {number}")) % 97 / 97.0

    def trouble(adapter, x, cond):
        hit = (cond["c"][:, 0] - marked).abs() < 1e-6
        if hit.any():
            action(x, hit)

    return trouble


def test_one_bad_row_does_not_harm_its_neighbours(tmp_path):
    whole, _ = make(tmp_path / "whole", TABLE)

    def fail(x, hit):
        raise RuntimeError("this row is wrong")

    run, tally = make(tmp_path / "run", TABLE, engine(trouble=only(2, fail)))
    assert (tally.done, tally.failed) == (7, 1)
    assert errors(run)[2]["message"] == "RuntimeError: this row is wrong"
    assert "tests.runs" in errors(run)[2]["where"]
    good = pictures(tmp_path / "whole")
    assert pictures(tmp_path / "run").items() <= good.items()
    told = json.loads((tmp_path / "run/failed/000002.json").read_text())
    assert told["error"]["code"] == "exception"
    _, tally = make(tmp_path / "run", TABLE)
    assert (tally.done, tally.skipped) == (0, 8), "a recorded error is settled"
    _, tally = make(tmp_path / "run", TABLE, work_options=WorkOptions(retry_errors=True))
    assert tally.done == 1 and pictures(tmp_path / "run") == good
    assert not (tmp_path / "run/failed/000002.json").exists()


def test_strict_and_max_errors_stop(tmp_path):
    def fail(x, hit):
        raise RuntimeError("odd")

    strict = WorkOptions(strict=True)
    with pytest.raises(SamplerError, match="Image 0: RuntimeError: odd") as caught:
        make(tmp_path / "a", TABLE, engine(trouble=lambda *_: fail(0, 0)), work_options=strict)
    assert caught.value.code == 1
    few = WorkOptions(max_errors=2)
    with pytest.raises(SamplerError, match="More than 2") as caught:
        made = engine(trouble=lambda *_: fail(0, 0), pause=0.01)
        make(tmp_path / "b", prompts(40), made, work_options=few)
    assert caught.value.code == 3


def test_rows_that_are_not_finite_are_named_and_not_saved(tmp_path):
    def spoil(x, hit):
        x[hit] = float("nan")

    run, tally = make(tmp_path / "run", TABLE, engine(trouble=only(5, spoil)))
    assert (tally.done, tally.failed) == (7, 1)
    error = errors(run)[5]
    assert (error["code"], error["where"]) == ("nonfinite", "denoiser") and "step 0" in error[
        "message"
    ]
    assert len(pictures(tmp_path / "run")) == 7


class HalfVae(torch.nn.Module):
    """Overflows in half precision, as real ones do, and not in float32."""

    def __init__(self, always):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
        self.always = always

    @property
    def dtype(self):
        return self.weight.dtype


@pytest.mark.parametrize(("always", "policy"), [(0, "retry"), (1, "retry"), (0, "fail")])
def test_a_decode_is_tried_again_in_float32(tmp_path, always, policy):
    made = engine()
    vae = made.pipeline.pipe.vae = HalfVae(always)
    real = made.pipeline.decode

    def decode(latents):
        images = real(latents)
        if always or vae.dtype == torch.float16:
            images[-1] = float("inf")
        return images

    made.pipeline.decode = decode
    options = WorkOptions(on_nonfinite=policy)
    run, tally = make(tmp_path / "run", TABLE[:4], made, work_options=options)
    assert vae.dtype == torch.float16, "it is as it was"
    entry = next(e for e in run.results().entries.values() if e["index"] == 3)
    if always or policy == "fail":
        assert tally.failed == 1 and entry["error"]["where"] == "vae"
    else:
        assert tally.failed == 0 and "float32" in entry["warnings"][0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO])
def test_a_failing_disk_stops_the_run_cleanly(tmp_path, monkeypatch, code):
    monkeypatch.setattr(durable, "FIRST_PAUSE", 0.001)
    real, calls = os.write, []

    def write(handle, data):
        calls.append(1)
        if len(calls) > 14:
            raise OSError(code, os.strerror(code))
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(SamplerError, match="MiB free") as caught:
        make(tmp_path / "run", prompts(40), batch_size=2)
    assert caught.value.code == 5 and str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    assert all(map(is_intact, pictures(tmp_path / "run").values()))
    _, tally = make(tmp_path / "run", prompts(40), batch_size=2)
    assert tally.done + tally.skipped == 40


def test_transient_errors_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "FIRST_PAUSE", 0.001)
    real, calls = os.replace, []

    def replace(*arguments):
        calls.append(1)
        if len(calls) % 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    durable.write_file(tmp_path / "a", b"data")
    assert (tmp_path / "a").read_bytes() == b"data" and len(calls) == 3


LIMITED = """
import resource, signal, sys
from tests.runs.stub import make, prompts
from sampler.core.errors import SamplerError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    make(sys.argv[1], prompts(40), batch_size=2)
except SamplerError as error:
    print(error); sys.exit(error.code)
"""


def test_a_file_size_limit_is_a_storage_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "run")],
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 5 and "file too large" in done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_writer_and_tells_how_to_go_on(tmp_path, number):
    out = tmp_path / "run"
    line = ["generate", "a fox", "-n", "60", "--batch-size", "1", "--steps", "4", "-o", out]
    process = Forked(line, tmp_path)
    while not process.out.read_text():
        time.sleep(0.01)
    os.kill(process.pid, number)
    done = process.wait()
    assert done.returncode == 128 + number and "sampler resume" in done.stderr
    entries = (out / "journal.jsonl").read_text().splitlines()
    assert 0 < len(entries) < 60
    assert all((out / json.loads(line)["file"]).is_file() for line in entries)


def test_two_signals_end_at_once(tmp_path):
    pid = os.fork()
    if pid == 0:
        from sampler.runs.stop import stop_on_signals

        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        os._exit(0)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 143


def test_a_prompt_that_is_too_long_is_told():
    class Tokenizer:  # not a SimpleNamespace: its lock needs a weak reference
        model_max_length = 16

        def tokenize(self, text):
            return text.split()

        def num_special_tokens_to_add(self):
            return 2

    texts = PromptCache(SimpleNamespace(pipe=SimpleNamespace(tokenizer=Tokenizer())))
    assert texts.warning("a fox") is None
    assert texts.warning("word " * 20) == "6 tokens of the prompt were dropped"


@pytest.mark.parametrize(("policy", "done"), [("keep", 8), ("blur", 8), ("drop", 0)])
def test_flagged_images_are_kept_blurred_or_dropped_never_black(tmp_path, policy, done):
    made = engine()
    pipe = made.pipeline.pipe
    pipe.device, pipe.dtype = torch.device("cpu"), torch.float32

    class Inputs(dict):
        pixel_values = torch.zeros(1)

        def to(self, _):
            return self

    pipe.feature_extractor = lambda images, return_tensors: Inputs()

    def checker(images, clip_input):
        images[:] = 0
        return images, [True]

    pipe.safety_checker = checker
    output = OutputOptions(flagged=policy)
    run, tally = make(tmp_path / "run", TABLE, made, output=output)
    assert tally.done == done and tally.failed == 0
    for data in pictures(tmp_path / "run").values():
        assert png.decode(data)[0].any()
    entries = run.results().entries.values()
    assert all("flagged" in str(entry) for entry in entries), "recorded, whatever is done"
    statuses = {entry["status"] for entry in entries}
    assert statuses == ({"skipped"} if policy == "drop" else {"ok"})
    assert not run.missing()


def test_batches_of_one_do_not_depend_on_others(tmp_path):
    whole, _ = make(tmp_path / "a", TABLE, batch_size=1)
    part, _ = make(tmp_path / "b", TABLE[5:6], batch_size=1)
    (name,) = pictures(tmp_path / "b")
    key = name.partition("-")[2]
    same = [d for n, d in pictures(tmp_path / "a").items() if n.endswith(key)]
    assert same == [pictures(tmp_path / "b")[name]]


@pytest.mark.parametrize("rule", ["cfg", "apg"])
def test_a_scale_per_row_is_the_scale_of_each_row(tmp_path, rule):
    """Together and alone, the same bytes and the same counted evaluations."""
    scales = [2.0, 3.3, 1.0, 5.0, 7.5, 0.0]
    table = [(where, {**cells, "scale": scales[k % 6], "guidance": rule})
             for k, (where, cells, *_) in enumerate(prompts(12))]  # fmt: skip
    together, _ = make(tmp_path / "a", table, batch_size=8)
    alone, _ = make(tmp_path / "b", table, batch_size=1)
    assert len(together.batches[0].jobs) == 8
    assert len({together.job(k).group for k in together.batches[0].jobs}) == 4
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    counted = [{key: e["nfe"] for key, e in run.results().entries.items()}
               for run in (together, alone)]  # fmt: skip
    assert counted[0] == counted[1]
    record = metadata.read_record(next(iter(pictures(tmp_path / "a").values())))["record"]
    assert record["guidance"]["scale"] == 2.0


def test_nothing_black_comes_of_numbers_out_of_range():
    images = torch.tensor([2.0, -1.0, 0.5, float("nan")]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    from sampler.core.images import to_pixels

    assert np.unique(to_pixels(images)).tolist() == [0, 128, 255]
    assert BatchRunner


def test_writers_that_hang_are_waited_for_no_longer_than_asked(tmp_path):
    """Two stuck threads, one limit for both."""
    stuck, store = threading.Event(), LocalStore(tmp_path)
    store.put = lambda name, data: stuck.wait(60)
    pump = ImageWriter(store, threads=2)
    pump.__enter__()
    line = {"status": "ok", "file": "images/a.png"}
    pump.put([WriteItem(line, np.zeros((8, 8, 3), np.uint8)) for _ in range(2)])
    assert not pump.close(0.5)
    stuck.set()
    assert pump.close(None)
