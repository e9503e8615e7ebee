"""AlignProp's gradient: against TRL's stored ones, plain autograd, finite differences, memory."""

import json
import random

import numpy as np
import pytest
import torch

import sampler
from sampler.training.alignprop.trainer import AlignProp
from sampler.training.alignprop.truncation import kept_steps
from tests.training import toy


def window(steps, k):
    return [i >= steps - k for i in range(steps)]


def walk(trainer, session, run, kept):
    return trainer.window(session, kept).walk(run)


def reward(x):
    return -(x.tanh() - 0.3).square().flatten(1).mean(1)


@pytest.mark.parametrize("case", range(12))
def test_gradients_are_trls(case):
    stored, cases = toy.golden("alignprop_truncated_grad")
    spec, key = cases[case], f"c{case:03d}_"
    names = json.loads(str(stored["param_order"]))
    weights = {n: torch.tensor(stored[f"w_{n}"]) for n in names}
    net = toy.Net(weights)
    scale = spec["guidance_scale"]
    rule = {"name": "cfg", "scale": scale} if scale > 1 else "none"
    engine = sampler.Engine(sampler.denoiser(net), sampler="ddim", guidance=rule)
    cond = sampler.Cond(torch.tensor(stored["embeds"]), torch.tensor(stored["neg_embeds"]))
    x, target = torch.tensor(stored["latents"]), torch.tensor(stored["target"])
    session, run = toy.begin(engine, x, toy.SCHEDULE.grid(spec["steps"]), cond)
    trainer = AlignProp(checkpointing=spec["gradient_checkpoint"])
    final, _ = walk(trainer, session, run, window(spec["steps"], spec["K"]))
    scores = -(final.x - target).square().flatten(1).mean(1)
    np.testing.assert_allclose(final.x.detach(), stored[f"{key}image"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.detach(), stored[f"{key}reward"], rtol=1e-4)
    grads = torch.autograd.grad(-scores.mean(), [net.get_parameter(n) for n in names])
    flat = torch.cat([g.flatten() for g in grads]).numpy()
    wanted = stored[f"{key}grad"]
    assert np.linalg.norm(flat - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("scale", [1, 4.0])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_gradients_are_those_of_a_graph_that_is_cut_by_hand(scale, k):
    """The DDIM formula in plain torch with x detached where the window begins."""
    net = toy.Net()
    session, run = toy.world(net, 10, scale)
    final, _ = walk(AlignProp(), session, run, window(10, k))
    x, cond = run.snapshot.x, run.cond
    for i, (now, after) in enumerate(zip(run.levels[:-1], run.levels[1:], strict=True)):
        x = x.detach() if i <= 10 - k else x
        eps = net(x, now, cond.cond)
        if scale != 1:
            none = net(x, now, cond.uncond)
            eps = none + scale * (eps - none)
        x = after.alpha * (x - now.sigma * eps) / now.alpha + after.sigma * eps
    ours, plain = (toy.gradient(net, -reward(v).mean()) for v in (final.x, x))
    assert (ours - plain).norm() <= 1e-12 * plain.norm()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_recomputing_changes_nothing_and_noise_is_redrawn_alike(eta):
    net = toy.Net()
    session, run = toy.world(net, 6, 3.0, eta)
    grads = []
    for checkpointing in (True, False):
        final, _ = walk(AlignProp(checkpointing=checkpointing), session, run, window(6, 4))
        grads.append(toy.gradient(net, -reward(final.x).mean()))
    assert torch.equal(*grads) and grads[0].norm() > 0


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gradients_are_finite_differences(eta):
    net = toy.Net()
    session, run = toy.world(net, 5, 2.0, eta)

    def objective():
        final, _ = walk(AlignProp(), session, run, [True] * 5)
        return reward(final.x).mean()

    gradient = toy.gradient(net, objective())
    parameters, g = list(net.parameters()), torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(gradient.shape, generator=g, dtype=torch.float64)
        ends = []
        for sign in (1e-6, -1e-6):
            _shift(parameters, sign * direction)
            with torch.no_grad():
                ends.append(float(objective()))
            _shift(parameters, -sign * direction)
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(float(gradient @ direction), rel=1e-6)


def _shift(parameters, vector):
    pieces = vector.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data += piece.view_as(parameter)


def test_the_prefix_moves_x_and_has_no_gradient():
    net, other = toy.Net(), toy.Net(seed=1)
    session, run = toy.world(net, 8, 1)

    def two(x, level, cond):  # another copy of the network before the window
        return (other if level.t > run.levels[5].t else net)(x, level, cond)

    session, run = toy.world(two, 8, 1)
    final, _ = walk(AlignProp(), session, run, window(8, 3))
    loss = -reward(final.x).mean()
    grads = torch.autograd.grad(loss, [*net.parameters(), *other.parameters()], allow_unused=True)
    assert all(g is not None for g in grads[:6]) and all(g is None for g in grads[6:])


def test_a_cut_at_the_input_leaves_the_linear_path():
    """Gradient of the last two steps: the earlier output enters x' linearly only."""
    net = toy.Net()
    session, run = toy.world(net, 4, 1)
    final, _ = walk(AlignProp(through_input=False), session, run, window(4, 2))
    ours = toy.gradient(net, -reward(final.x).mean())
    with torch.no_grad():
        before = walk(AlignProp(), session, run, window(4, 1))[0]
        x, _ = session.engine.start(run.snapshot.x, run.levels, run.cond)
        for snapshot in session.engine.steps(x, run.levels[:3], run.cond):
            x = snapshot.x
    assert before.index == 4
    for now, after in zip(run.levels[2:-1], run.levels[3:], strict=True):
        eps = net(x.detach(), now, run.cond.cond)
        x = after.alpha * (x - now.sigma * eps) / now.alpha + after.sigma * eps
    plain = toy.gradient(net, -reward(x).mean())
    full = walk(AlignProp(), session, run, window(4, 2))[0]
    assert (ours - plain).norm() <= 1e-12 * plain.norm()
    assert (ours - toy.gradient(net, -reward(full.x).mean())).norm() > 1e-3 * plain.norm()


def test_per_step_keeps_a_subset():
    """A step that is not kept has the value of its output and no gradient of it."""
    net = toy.Net()
    session, run = toy.world(net, 4, 1)
    kept = [False, True, False, True]
    final, _ = walk(AlignProp(), session, run, kept)
    x = run.snapshot.x
    for i, (now, after) in enumerate(zip(run.levels[:-1], run.levels[1:], strict=True)):
        eps = net(x, now, run.cond.cond)
        eps = eps if kept[i] else eps.detach()
        x = after.alpha * (x - now.sigma * eps) / now.alpha + after.sigma * eps
    ours, plain = (toy.gradient(net, -reward(v).mean()) for v in (final.x, x))
    assert (ours - plain).norm() <= 1e-12 * plain.norm()


def test_truncations_draw_what_they_say():
    def drawn(kind, total, **options):
        fields = {"k": 1, "low": 0, "high": None, "mean": 0.84, "std": 0.1, **options}
        g = random.Random(0)
        return [kept_steps(kind, total, g, **fields) for _ in range(4000)]

    assert drawn("fixed", 5, k=2)[0] == [False, False, False, True, True]
    firsts = [kept.index(True) for kept in drawn("gaussian", 50)]
    assert min(firsts) >= 1 and max(firsts) < 50
    # int() rounds N(42, 5) down, and the distribution ends at 50
    assert abs(np.mean(firsts) - 41.1) < 0.4 and abs(np.std(firsts) - 4.5) < 0.5
    assert all(kept.index(True) == 0 for kept in drawn("gaussian", 1))
    for mean, first in ((0.001, 1), (0.845, 42), (0.9999, 49)):  # however improbable 1..49 are
        narrow = drawn("gaussian", 50, mean=mean, std=1e-6)
        assert {kept.index(True) for kept in narrow} == {first}
    firsts = [kept.index(True) for kept in drawn("uniform", 50, low=30, high=39)]
    assert sorted(set(firsts)) == list(range(30, 40))
    for total, k in ((50, 5), (7, 3), (4, 4)):  # as far apart as they can be, all equally often
        spread = drawn("spread", total, k=k)
        steps = [[i for i, keep in enumerate(kept) if keep] for kept in spread]
        gaps = {b - a for found in steps for a, b in zip(found, found[1:], strict=False)}
        assert {len(found) for found in steps} == {k}
        assert gaps <= {total // k, -(-total // k)}
        shares = np.mean(spread, axis=0)
        assert np.abs(shares - k / total).max() < 0.05
    counts = [sum(kept) for kept in drawn("per_step", 50)]
    assert abs(np.mean(counts) - sum((i + 1) / 51 for i in range(49)) - 1) < 0.3


def saved_bytes(*arguments):
    """Bytes that a forward pass keeps for the backward pass, beside what exists anyway."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        walk(*arguments)
    return sum(kept.values())


def test_memory_is_that_of_the_window():
    """The prefix keeps nothing; with recomputation a step keeps its x alone."""
    net = toy.Net()
    sizes = {}
    for steps, k, checkpointing in [(5, 1, False), (50, 1, False), (20, 20, False), (20, 20, True)]:
        session, run = toy.world(net, steps, 4.0)
        trainer = AlignProp(checkpointing=checkpointing)
        sizes[steps, k, checkpointing] = saved_bytes(trainer, session, run, window(steps, k))
    assert sizes[50, 1, False] <= 1.1 * sizes[5, 1, False]
    one_step = sizes[5, 1, False]
    assert sizes[20, 20, True] + one_step <= 0.35 * sizes[20, 20, False]


def test_losses():
    scores = torch.tensor([1.0, 3.0])
    assert AlignProp(loss_scale=2.0).loss_of(scores).tolist() == [-2, -6]
    assert AlignProp(loss="target", value=2.5).loss_of(scores).tolist() == [1.5, 0.5]
    assert AlignProp(loss="hinge", value=2, loss_scale=1e-3).loss_of(scores).tolist() == [
        pytest.approx(1e-3),
        0,
    ]


def test_bad_fields_are_one_sentence():
    for fields, problem in [
        ({"k": 0}, "k = 0"),
        ({"mean": 1.2}, "mean"),
        ({"lv": 2}, "lv needs"),
        ({"early": 2, "ending": "jump"}, "early and ending = 'jump'"),
        ({"early": 1, "lv": 1, "truncation": "fixed"}, "early and lv"),
        ({"anchor": -1.0}, "at least 0"),
    ]:
        with pytest.raises(ValueError, match=problem):
            sampler.build("trainer", {"name": "alignprop", **fields})
