"""Runs as graphs: the bookkeeping with a capture that runs on the CPU, the graphs on a GPU."""

import pytest
import torch
from sampler_kernels import leaves

import sampler
from sampler import engine as module
from sampler.graphs import GraphedRuns, graphed

PROMPTS = ["a red apple", "a fox", "a tree", "the moon", "a boat"]


class Recorded:
    """Captures by keeping the function, and replays by calling it into the first outputs."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, fn):
        self.captures += 1
        outputs = fn()

        def replay():
            self.replays += 1
            for old, new in zip(leaves(outputs), leaves(fn()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return replay, outputs


@pytest.fixture(scope="module")
def engine():
    return sampler.load(device="cpu")


def images(engine, monkeypatch, runs, **options):
    with monkeypatch.context() as patch:
        patch.setattr(module, "graphed", lambda engine, graph, batches: runs)
        defaults = {"steps": 3, "seeds": 1, "output": "latent", "batch_size": 2}
        return engine.generate(PROMPTS, **{**defaults, **options})


@pytest.mark.parametrize("guidance", ["cfg", "apg"])
def test_replayed_batches_are_the_batches(engine, monkeypatch, guidance):
    recorded = Recorded()
    usual = images(engine, monkeypatch, None, guidance=guidance)
    mine = images(engine, monkeypatch, GraphedRuns(engine, True, recorded), guidance=guidance)
    assert torch.equal(usual.latents, mine.latents) and usual.nfe == mine.nfe
    # Five images in batches of two: the last one has another shape and runs as usual.
    assert (recorded.captures, recorded.replays) == (1, 2)


def test_runs_that_cannot_be_captured(engine, monkeypatch):
    noisy = {"name": "ddim", "eta": 1.0}
    usual = images(engine, monkeypatch, None, sampler=noisy)
    recorded = Recorded()
    mine = images(engine, monkeypatch, GraphedRuns(engine, False, recorded), sampler=noisy)
    assert torch.equal(usual.latents, mine.latents) and recorded.captures == 0
    with pytest.raises(sampler.SamplerError, match="'ddim' draws noise") as caught:
        images(engine, monkeypatch, GraphedRuns(engine, True, recorded), sampler=noisy)
    assert caught.value.code == 2

    def refuses(fn):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    images(engine, monkeypatch, GraphedRuns(engine, False, refuses))
    with pytest.raises(sampler.SamplerError, match=r"capturing\); use 'auto'"):
        images(engine, monkeypatch, GraphedRuns(engine, True, refuses))


def test_the_option_without_a_gpu(engine):
    assert graphed(engine, False, 9) is None and graphed(engine, "auto", 9) is None
    with pytest.raises(sampler.SamplerError, match="needs a CUDA device"):
        engine.generate("a fox", graph=True)
    with pytest.raises(ValueError, match="True, False or 'auto'"):
        engine.generate("a fox", graph="yes")


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", ["cfg", "apg"])
def test_graphs_are_the_usual_runs_on_a_gpu(guidance):
    engine = sampler.load(device="cuda")
    given = {"steps": 4, "seeds": 1, "output": "latent", "batch_size": 2, "guidance": guidance}
    usual = engine.generate(PROMPTS, **given)
    assert torch.equal(usual.latents, engine.generate(PROMPTS, graph=True, **given).latents)
    adaptive = {**given, "guidance": "adaptive"}
    adaptive["batch_size"] = 1
    assert engine.generate(PROMPTS, graph="auto", **adaptive).nfe
