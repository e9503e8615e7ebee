"""Runs as graphs: the bookkeeping with a capture that runs on the CPU, the graphs on a GPU."""

import pytest
import torch
from sampler_kernels import leaves, map_tree

import sampler
from sampler import registry
from sampler.core import generation as module
from sampler.core.benchmark import APG
from sampler.core.cuda_capture import clone, refill
from sampler.core.graphs import GraphedRuns, graphed
from sampler.core.trajectory import Run
from tests.kernels.canary import vp_levels

STEPS = 3
PROMPTS = ["a red apple", "a fox", "a tree", "the moon", "a boat"]


class Recorded:
    """Captures by keeping the function, and replays by calling it again into the outputs.

    The outputs hold NaN before the first replay: a graph computes nothing while it is captured.
    """

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, fn):
        self.captures += 1
        outputs = map_tree(clone, fn())
        for t in tensors(outputs):
            t.fill_(float("nan"))

        def replay():
            self.replays += 1
            map_tree(refill, outputs, fn())

        return replay, outputs


def tensors(tree):
    return [t for t in leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.fixture(scope="module")
def engine():
    return sampler.load(device="cpu")


def images(engine, monkeypatch, runs, **options):
    with monkeypatch.context() as patch:
        patch.setattr(module, "graphed", lambda engine, graph, batches: runs)
        defaults = {"steps": STEPS, "seeds": 1, "output": "latent", "batch_size": 2}
        return engine.generate(PROMPTS, **{**defaults, **options})


@pytest.mark.parametrize("guidance", ["cfg", APG], ids=["cfg", "apg"])
def test_replayed_batches_are_the_batches(engine, monkeypatch, guidance):
    recorded = Recorded()
    usual = images(engine, monkeypatch, None, guidance=guidance)
    mine = images(engine, monkeypatch, GraphedRuns(engine, True, recorded), guidance=guidance)
    assert torch.equal(usual.latents, mine.latents) and usual.nfe == mine.nfe
    assert usual.solver_error == mine.solver_error
    # Five images in batches of two: the last one has another shape and runs as usual.
    assert (recorded.captures, recorded.replays) == (STEPS, 2 * STEPS)


def network(x, level, cond):
    """Answers that come closer to each other with every step, at a pace of each row's own."""
    return x * 0.3 + cond.view(-1, 1) * level.sigma**2 * (1 + x.abs())


TOY = sampler.Engine(sampler.denoiser(network, "eps"))
ADAPTIVE = {"name": "adaptive", "compact": "batch", "threshold": 0.97}


def toy_runs(runs, rule, method="ddim", steps=12, seeds=range(4), place=lambda t: t):
    """[(x, nfe)] of batches of two rows, by graphs or (None) as usual."""
    found = []
    rule, method = registry.build("guidance", rule), registry.build("sampler", method)
    for seed in seeds:
        x = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed))
        weight = torch.tensor([0.2, 0.4]) * (1 + seed)
        cond = sampler.Cond(place(weight), place(-weight))
        with torch.no_grad():
            start = TOY.start(place(x), vp_levels(steps), cond, method, rule, [1, 2])
            run = Run(*start, cond, method, rule)
            x, snap = runs(run) if runs else TOY.run_to_end(*run)
        found.append((x, snap.nfe))
    return found


def equal(a, b):
    return all(torch.equal(x, y) and n == m for (x, n), (y, m) in zip(a, b, strict=True))


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("inner", ["cfg", APG], ids=["cfg", "apg"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("after", ["drop", "hold"])
def test_adaptive_guidance_switches_between_two_graphs(after, lag, inner, method):
    """Batches converge at steps of their own: a step has a graph with and one without the pair."""
    rule = {**ADAPTIVE, "lag": lag, "after": after, "rule": inner}
    usual = toy_runs(None, rule, method)
    recorded = Recorded()
    runs = GraphedRuns(TOY, True, recorded)
    assert equal(usual, toy_runs(runs, rule, method))
    assert len({nfe for _, nfe in usual}) > (2 if inner == "cfg" else 0)
    assert recorded.replays == 4 * 12
    assert 12 < recorded.captures == len(runs.graphs.graphs) <= 2 * 12
    captured = recorded.captures
    assert equal(reversed(usual), toy_runs(runs, rule, method, seeds=(3, 2, 1, 0)))
    assert recorded.captures == captured


def test_rows_that_are_left_out_one_by_one_are_no_graph():
    rule = {**ADAPTIVE, "compact": "rows"}
    recorded = Recorded()
    assert equal(toy_runs(None, rule), toy_runs(GraphedRuns(TOY, False, recorded), rule))
    assert 0 < recorded.replays < 4 * 12
    with pytest.raises(sampler.SamplerError, match="'adaptive' leaves rows out.*'batch'"):
        toy_runs(GraphedRuns(TOY, True, recorded), rule)


def test_rules_that_look_at_numbers_on_the_host_are_no_graph():
    """As CUDA says it while it captures; the step then runs as usual."""

    def refuses(fn):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    usual = toy_runs(None, "cfg")
    assert equal(usual, toy_runs(GraphedRuns(TOY, False, refuses), "cfg"))
    with pytest.raises(sampler.SamplerError, match=r"is capturing\); use 'auto'") as caught:
        toy_runs(GraphedRuns(TOY, True, refuses), "cfg")
    assert caught.value.code == 2


def test_other_runs_than_the_first_one_run_as_usual():
    recorded = Recorded()
    runs = GraphedRuns(TOY, True, recorded)
    toy_runs(runs, "cfg")
    replays = recorded.replays
    for other in ({"rule": APG}, {"method": "dpmpp_2m"}, {"steps": 9}):
        given = {"rule": "cfg", **other}
        assert equal(toy_runs(None, **given), toy_runs(runs, **given))
        assert recorded.replays == replays
    toy_runs(runs, "cfg")
    assert recorded.replays == 2 * replays


def test_runs_that_cannot_be_captured(engine, monkeypatch):
    noisy = {"name": "ddim", "eta": 1.0}
    usual = images(engine, monkeypatch, None, sampler=noisy)
    recorded = Recorded()
    mine = images(engine, monkeypatch, GraphedRuns(engine, False, recorded), sampler=noisy)
    assert torch.equal(usual.latents, mine.latents) and recorded.captures == 0
    with pytest.raises(sampler.SamplerError, match="'ddim' draws noise") as caught:
        images(engine, monkeypatch, GraphedRuns(engine, True, recorded), sampler=noisy)
    assert caught.value.code == 2


def test_the_option_without_a_gpu(engine):
    assert graphed(engine, False, 9) is None and graphed(engine, "auto", 9) is None
    with pytest.raises(sampler.SamplerError, match="needs a CUDA device"):
        engine.generate("a fox", graph=True)
    with pytest.raises(ValueError, match="True, False or 'auto'"):
        engine.generate("a fox", graph="yes")


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", ["cfg", APG], ids=["cfg", "apg"])
def test_graphs_are_the_usual_runs_on_a_gpu(guidance):
    engine = sampler.load(device="cuda")
    given = {"steps": 4, "seeds": 1, "output": "latent", "batch_size": 2, "guidance": guidance}
    usual = engine.generate(PROMPTS, **given)
    assert torch.equal(usual.latents, engine.generate(PROMPTS, graph=True, **given).latents)


@pytest.mark.gpu
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("after", ["drop", "hold"])
def test_adaptive_graphs_are_the_usual_runs_on_a_gpu(after, lag):
    engine = sampler.load(device="cuda")
    rule = {**ADAPTIVE, "lag": lag, "after": after}
    given = {"steps": 12, "seeds": 1, "output": "latent", "batch_size": 1, "guidance": rule}
    usual = engine.generate(PROMPTS, **given)
    mine = engine.generate(PROMPTS, graph=True, **given)
    assert torch.equal(usual.latents, mine.latents) and usual.nfe == mine.nfe
    rule["compact"] = "rows"
    assert engine.generate(PROMPTS, graph="auto", **given).nfe == usual.nfe
