"""Captures with stand-ins for CUDA: device, stream and memory pool, and what happens on refusal."""

import pytest
import torch
from sampler_kernels import leaves

import sampler
from sampler.core.benchmark import APG
from sampler.core.cuda_capture import CudaCapture
from sampler.core.graphs import GraphedRuns
from sampler.guidance import host_copy
from tests.kernels.fake_cuda import CAUSE, Fake
from tests.test_graphs import equal, toy_runs

DEVICE = torch.device("cuda:1")  # never the current device


@pytest.fixture
def cuda(monkeypatch):
    return Fake().install(monkeypatch)


@pytest.fixture
def engine(cuda):
    def network(x, level, cond):
        cuda.called()
        return x * 0.3 + cond.view(-1, 1) * level.sigma**2 * (1 + x.abs())

    return sampler.Engine(sampler.denoiser(network, "eps"))


def runs(engine, required=False):
    return GraphedRuns(engine, required, CudaCapture(DEVICE))


def without(engine):
    return lambda run: engine.run_to_end(*run)


def test_all_graphs_of_a_run_share_one_pool(cuda, engine):
    toy_runs(runs(engine), "cfg", steps=5)
    assert len(cuda.pools) == 5 and set(cuda.pools) == {("pool", 1)}


def test_outputs_are_allocated_before_the_capture(cuda):
    """Memory of the pool is reused by the next graph, so what a call returns must not be kept."""
    made = []

    def fn():
        cuda.called()
        made.append(torch.full((3,), 2.0))
        return {"x": made[-1], "n": 7}

    _, outputs = CudaCapture(DEVICE)(fn)
    made[-1].fill_(float("nan"))
    assert outputs["n"] == 7 and torch.equal(outputs["x"], torch.full((3,), 2.0))
    assert [event for event, *_ in cuda.log if "call" in event] == ["call", "call", "captured call"]


def test_capture_and_replay_happen_on_the_device_of_the_model(cuda, engine):
    toy_runs(runs(engine), "cfg", steps=2)
    seen = {event: device for event, device, _ in cuda.log}
    for event in ("begin", "end", "captured call", "replay", "new stream"):
        assert seen[event] == "cuda:1", event
    assert {stream for event, _, stream in cuda.log if event == "captured call"} == {"side"}
    assert (str(cuda.device), cuda.stream) == ("cuda:0", "main")


def test_copies_of_flags_are_marked_on_the_device_of_the_flags(cuda, monkeypatch):
    class Flags:
        device = DEVICE
        dtype = torch.float32
        shape = (2,)

    class Copy:
        def copy_(self, flags, non_blocking):
            assert non_blocking

    monkeypatch.setattr(host_copy, "_pinned", lambda flags: Copy())
    host_copy.start_copy(Flags())
    assert ("event", "cuda:1", "main") in cuda.log


def test_captures_do_not_forbid_cuda_calls_of_other_threads(cuda, engine):
    toy_runs(runs(engine), "cfg", steps=2)
    assert set(cuda.modes) == {"thread_local"}


def test_a_refused_capture_restores_the_stream_and_is_tried_once(cuda, engine):
    usual = toy_runs(without(engine), "cfg")
    cuda.refusal = True
    assert equal(usual, toy_runs(runs(engine), "cfg"))
    assert len(cuda.pools) == 1
    assert (cuda.stream, cuda.mode) == ("main", 0)


def test_a_refused_capture_reports_its_cause(cuda, engine):
    cuda.refusal = True
    with pytest.raises(sampler.SamplerError, match=rf"\({CAUSE}\); use 'auto'") as caught:
        toy_runs(runs(engine, required=True), "cfg")
    assert caught.value.code == 2 and cuda.stream == "main"


def test_what_synchronizes_is_refused_before_a_capture_begins(cuda, engine):
    usual = toy_runs(without(engine), "cfg")
    cuda.syncs = True
    assert equal(usual, toy_runs(runs(engine), "cfg"))
    assert not cuda.pools and cuda.mode == 0
    with pytest.raises(sampler.SamplerError, match="synchronizing CUDA operation"):
        toy_runs(runs(engine, required=True), "cfg")


def test_automatic_graphs_give_way_where_memory_is_short(cuda, engine):
    """Later in the first run: the steps before it were replayed, the rest runs without graphs."""

    class Short(CudaCapture):
        def __call__(self, fn):
            if len(cuda.pools) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            outputs = super().__call__(fn)[1]
            return (lambda: fill(outputs, fn())), outputs

    def fill(own, given):
        for a, b in zip(leaves(own), leaves(given), strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(b)

    usual = toy_runs(without(engine), APG)
    found = GraphedRuns(engine, False, Short(DEVICE))
    assert equal(usual, toy_runs(found, APG))
    assert found.failed and found.graphs is None and len(cuda.pools) == 3
