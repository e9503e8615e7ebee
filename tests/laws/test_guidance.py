"""The laws that every registered guidance rule obeys."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sampler
from sampler import registry
from sampler.core.snapshots import load_snapshot, save_snapshot
from tests.analytic import vp_grid
from tests.laws.world import Counting, buildable, cond, noise, run, spec

NAMES = buildable("guidance")


def build(name):
    return registry.build("guidance", spec("guidance", name))


@pytest.mark.parametrize("name", registry.names("guidance"))
def test_every_strategy_is_covered(name):
    if name in NAMES:
        build(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_see_its_batch(name):
    x, levels = noise(3), vp_grid(8)
    together = run("ddim", spec("guidance", name), levels, x)
    for row in range(3):
        alone = run("ddim", spec("guidance", name), levels, x[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", NAMES)
def test_resuming_from_any_snapshot_is_bit_equal(name, tmp_path):
    rule, levels, x = build(name), vp_grid(6), noise(2)
    engine = sampler.Engine(Counting().denoiser)
    first, grid = engine.start(x, levels, cond(2), "ab", rule, [1, 2])
    whole = list(engine.steps(first, grid, cond(2), "ab", rule))
    for snapshot in whole[:-1]:
        save_snapshot(snapshot, tmp_path / "s")
        *_, last = engine.steps(load_snapshot(tmp_path / "s"), grid, cond(2), "ab", rule)
        assert torch.equal(last.x, whole[-1].x) and last.nfe == whole[-1].nfe


@pytest.mark.parametrize("name", NAMES)
def test_two_interleaved_runs_share_nothing(name):
    rule, levels = build(name), vp_grid(5)
    engine = sampler.Engine(Counting().denoiser)
    starts = [engine.start(noise(2) * k, levels, cond(2), "ddim", rule) for k in (1.0, 0.5)]
    alone = [list(engine.steps(s, grid, cond(2), "ddim", rule))[-1].x for s, grid in starts]
    walks = [engine.steps(s, grid, cond(2), "ddim", rule) for s, grid in starts]
    last = [None, None]
    for pair in zip(*walks, strict=True):
        last = [snap.x for snap in pair]
    assert all(torch.equal(a, b) for a, b in zip(alone, last, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3])
def test_counted_rows_are_the_reported_rows(name, rows):
    counting, rule, levels = Counting(), build(name), vp_grid(9)
    engine = sampler.Engine(counting.denoiser)
    first, grid = engine.start(noise(rows), levels, cond(rows), "ddim", rule)
    *_, last = engine.steps(first, grid, cond(rows), "ddim", rule)
    assert sum(counting.rows) == sum(last.nfe)


@pytest.mark.parametrize("name", NAMES)
def test_scale_one_is_the_conditional_model(name):
    rule = build(name)
    if "scale" not in getattr(rule, "__dataclass_fields__", {}):
        pytest.skip("has no scale")
    given = spec("guidance", name)
    given = {"name": given} if isinstance(given, str) else dict(given)
    levels, x = vp_grid(5), noise(2)
    plain = run("ddim", "none", levels, x)
    assert torch.equal(run("ddim", {**given, "scale": 1.0}, levels, x), plain)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_and_checkpointing_is_exact(name):
    rule, levels = build(name), vp_grid(4)
    engine = sampler.Engine(Counting().denoiser)
    probe = noise(1).roll(1)

    def loss(x):
        return (engine.run(x, levels, cond(1), "ddim", rule, grad=True) * probe).sum()

    leaf = noise(1).requires_grad_()
    (plain,) = torch.autograd.grad(loss(leaf), leaf)
    (saved,) = torch.autograd.grad(checkpoint(loss, leaf, use_reentrant=False), leaf)
    assert plain.isfinite().all() and plain.abs().sum() > 0
    assert torch.equal(plain, saved)


@pytest.mark.parametrize("name", NAMES)
def test_float64_stays_and_everything_else_is_float32(name):
    levels = vp_grid(4)
    for dtype, kept in ((torch.float64,) * 2, (torch.float16, torch.float32)):
        assert run("ddim", spec("guidance", name), levels, noise(2, dtype)).dtype == kept


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_of_an_instance_builds_an_equal_one(name):
    rule = build(name)
    assert registry.build("guidance", registry.spec_of(rule)) == rule
