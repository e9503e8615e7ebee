"""Adaptive guidance with lag = 1 never makes the host wait for the step that it has just queued."""

import pytest
import torch
from sampler_kernels import leaves

import sampler
from sampler.core.graphs import GraphedRuns, StepGraphs
from sampler.guidance import host_copy as host
from tests.kernels.canary import vp_levels
from tests.kernels.elsewhere import Device, Elsewhere
from tests.test_graphs import ADAPTIVE, TOY, Recorded, toy_runs

ROWS, STEPS = 4, 12


class Queue:
    """The device's queue as the host sees it: how many steps are in it, and how old a mark is."""

    def __init__(self):
        self.steps, self.ages = 0, []

    def marked(self, device):
        queue, at = self, self.steps

        class Mark:
            def synchronize(self):
                queue.ages.append(queue.steps - at)

        return Mark()


@pytest.fixture
def queue(monkeypatch):
    found = Queue()
    monkeypatch.setattr(host, "_pinned", lambda flags: torch.empty(flags.shape))
    monkeypatch.setattr(host, "_record_event", found.marked)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    return found


def model(queue):
    """Two answers that come closer to each other with every step, at a pace of each row's own."""

    def network(x, level, cond):
        queue.steps += 1
        return x * 0.3 + cond.view(-1, 1) * level.sigma**2 * (1 + x.abs())

    return sampler.denoiser(network, "eps")


def walk(queue, rule, device):
    def place(t):
        return Elsewhere(t) if device else t

    x = torch.randn(ROWS, 50, generator=torch.Generator().manual_seed(0))
    cond = sampler.Cond(place(torch.linspace(0.2, 1, ROWS)), place(-torch.linspace(0.2, 1, ROWS)))
    engine, grid = sampler.Engine(model(queue)), vp_levels(STEPS)
    snap, levels = engine.start(place(x), grid, cond, "ddim", rule)
    for snap in engine.steps(snap, levels, cond, "ddim", rule):
        pass
    return snap


RULES = {
    "drop": {"compact": "rows"},
    "together": {"compact": "batch"},
    "hold": {"after": "hold"},
    "turn": {"after": "hold", "turn": 0.9},
    "apg": {"rule": {"name": "apg", "momentum": -0.5}},
}


def adaptive(name, lag):
    given = {"name": "adaptive", "threshold": 0.97, "lag": lag, **RULES[name]}
    return sampler.build("guidance", given)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lag", [0, 1])
def test_what_the_host_waits_for_is_as_old_as_the_lag(queue, name, lag):
    """And nothing else reads the device: every such operation raises there."""
    rule = adaptive(name, lag)
    usual = walk(queue, rule, False)
    assert not queue.ages
    with torch.no_grad(), Device():
        found = walk(queue, rule, True)
    assert min(queue.ages) == lag  # older ones are looked at again once all rows are latched
    assert all(isinstance(t, (Elsewhere, float)) for t in leaves(found.guidance))
    assert torch.equal(found.x.here, usual.x) and found.nfe == usual.nfe
    assert STEPS < min(usual.nfe) and sum(usual.nfe) < 2 * STEPS * ROWS


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("after", ["drop", "hold"])
def test_graphs_are_switched_by_flags_of_their_own_batch(monkeypatch, queue, after, lag):
    """Copies of flags to the host belong to one batch, and start as early as without graphs."""
    rule = {**ADAPTIVE, "lag": lag, "after": after}
    usual = toy_runs(None, rule)
    runs = GraphedRuns(TOY, True, Recorded())

    def replayed(graphs, snap, span, branches, take=StepGraphs.step):
        queue.steps += 1
        return take(graphs, snap, span, branches)

    monkeypatch.setattr(StepGraphs, "step", replayed)
    with torch.no_grad(), Device():
        found = toy_runs(runs, rule, place=Elsewhere)
    assert [nfe for _, nfe in found] == [nfe for _, nfe in usual]
    assert all(torch.equal(a.here, b) for (a, _), (b, _) in zip(found, usual, strict=True))
    assert min(queue.ages) == lag


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t.cpu(),
        lambda t: t.tolist(),
        lambda t: t[t > 0],
        lambda t: torch.ones(3).to(t.device) * t,
        lambda t: t * torch.ones(3),
    ],
)
def test_such_a_device_notices(wait):
    with Device(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(Elsewhere(torch.ones(3)))
