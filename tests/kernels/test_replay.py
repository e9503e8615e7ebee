"""Replays of launches: the same results as walks, and only for the structure that they are of."""

import math
import weakref

import pytest
import torch
from sampler_kernels import Lin, gram, replay, settle, sqrt, use_backend, where
from sampler_kernels.counting import count_launches, dry_run

from sampler.core.benchmark import CASES, BenchmarkStep
from sampler.types import Level, Span


@pytest.fixture(autouse=True)
def replays(monkeypatch):
    """A structure is kept at once; the list has one item for every replay."""
    made, run = [], replay.Replay.run

    def counted(self, found, scalars):
        made.append(self)
        return run(self, found, scalars)

    monkeypatch.setattr(replay, "OFTEN", 1)
    monkeypatch.setattr(replay, "_settled", {})
    monkeypatch.setattr(replay, "_reduced", {})
    monkeypatch.setattr(replay.Replay, "run", counted)
    with torch.no_grad(), use_backend("triton"):
        yield made


def walked(fn):
    """The result of a call without replays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "is_possible", lambda: False)
        return fn()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def later(step, seed):
    """The same step with other tensors and other levels, in a state of its own."""
    draw = torch.Generator().manual_seed(seed)
    step.x = torch.randn(step.x.shape, generator=draw)
    step.c, step.u = (torch.randn(step.x.shape, generator=draw).to(step.c.dtype) for _ in "cu")
    if step.case.kind == "velocity":
        now, after = (Level(1000.0 * s, 1 - s, s) for s in (0.4 + seed / 50, 0.3))
    else:
        angles = (0.7 + seed / 50, 0.5)
        now, after = (Level(int(600 * a), math.cos(a), math.sin(a)) for a in angles)
    step.span = Span(step.span.index, now, after)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_replayed_step_is_the_walked_one(case, replays):
    """Bit for bit, states included, in the same launches, whatever its numbers and tensors are."""
    step = BenchmarkStep(case, (2, 4, 8, 8))
    step()
    for seed in range(1, 4):
        later(step, seed)
        with count_launches() as mine:
            found = step()
        with count_launches() as theirs:
            right = walked(step)
        assert same(found, right) and mine == theirs
    assert len(replays) == 3


def lazy(x, y, scale=0.3, flip=False):
    """A formula with inner products, and their quotient."""
    a, b = Lin.of(x), 2.5 * Lin.of(y)
    sums = gram(a - b, b)
    share = sums[0, 1] / where(sums[1, 1] == 0, 1.0, sums[1, 1])
    value = scale * (b - a if flip else a - b) + b * (share / sqrt(sums[0, 0]))
    return value, share


def inputs(seed=0, rows=2, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, 6, 6, generator=draw).to(dtype) for _ in "xy"]


def shaped(memory_format):
    return [t.to(memory_format=memory_format) for t in inputs(3)]


OTHERS = {
    "another type": lambda: lazy(*inputs(1, dtype=torch.float16)),
    "one of another type": lambda: lazy(inputs(1)[0], inputs(1)[1].bfloat16()),
    "another batch": lambda: lazy(*inputs(1, rows=3)),
    "another layout": lambda: lazy(*shaped(torch.channels_last)),
    "a number less": lambda: lazy(*inputs(1), scale=1.0),
    "operands the other way round": lambda: lazy(*inputs(1), flip=True),
    "a scalar that is known": lambda: (lambda v: (float(v[1].sum()), v)[1])(lazy(*inputs(1))),
    "a subclass": lambda: lazy(torch.nn.Parameter(inputs(1)[0], False), inputs(1)[1]),
    "a further output": lambda: (*lazy(*inputs(1)), Lin.of(inputs(2)[0]) * 2.0),
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_another_structure_is_not_taken_for_it(build, replays):
    settle(lazy(*inputs()))
    assert not replays
    settle(lazy(*inputs(1)))
    assert len(replays) == 1
    found, right = settle(build()), walked(lambda: settle(build()))
    assert same(found, right)
    assert len(replays) == 1  # the first of a new structure is walked


def test_what_is_one_tensor_in_a_structure_must_be_one_again(replays):
    x, y = inputs(1)
    settle(lazy(x, x))
    found = settle(lazy(x, y))
    assert not replays and same(found, walked(lambda: settle(lazy(x, y))))


def test_what_are_two_tensors_may_be_one(replays):
    """Use one tensor twice, which is then loaded twice."""
    settle(lazy(*inputs()))
    x = inputs(1)[0]
    found = settle(lazy(x, x))
    assert len(replays) == 1 and same(found, walked(lambda: settle(lazy(x, x))))


def test_a_number_that_two_nodes_share_is_two_numbers(replays):
    """As objects they may be one; the next step has two."""
    (x, y), number = inputs(1), 0.3
    settle(number * Lin.of(x) + number * Lin.of(y))
    found = settle(0.4 * Lin.of(x) + 0.7 * Lin.of(y))
    assert len(replays) == 1 and torch.equal(found, 0.4 * x + 0.7 * y)


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (2, 4, 6, 7), (2, 144)])
def test_another_shape_is_not_taken_for_it(shape, replays):
    """Of a formula without scalars, which tells the batch by themselves."""
    settle(2.0 * Lin.of(inputs()[0]))
    x = torch.randn(shape)
    assert torch.equal(settle(2.0 * Lin.of(x)), 2.0 * x) and not replays


def test_a_node_may_have_two_numbers(replays):
    def chosen(x, yes, no):
        square = gram(x)[0, 0]
        return settle(Lin.of(x) * where(square > 1e6, yes, no))

    x = inputs()[0] * torch.tensor([1e4, 1.0]).view(2, 1, 1, 1)
    chosen(x, 2.0, 3.0)
    found = chosen(x, 5.0, 7.0)
    assert len(replays) == 1
    assert torch.equal(found, x * torch.tensor([5.0, 7.0]).view(2, 1, 1, 1))


def test_gradients_are_never_replayed(replays):
    settle(lazy(*inputs())[0])
    with torch.enable_grad():
        x = inputs(1)[0].requires_grad_()
        settle(lazy(x, inputs(1)[1])[0]).sum().backward()
    assert not replays and x.grad is not None


def test_a_replay_leaves_values_as_a_walk_does(replays):
    settle(lazy(*inputs()))
    value, share = lazy(*inputs(1))
    settle((value, share))
    assert len(replays) == 1
    with count_launches() as launches:
        assert share.tensor().shape == (2,)
    assert not launches


def test_nothing_of_a_step_is_kept(replays):
    for seed in range(3):
        x, y = inputs(seed)
        kept = [weakref.ref(t) for t in (x, y, settle(lazy(x, y))[0])]
        del x, y
        assert [ref() for ref in kept] == [None] * 3, seed
    assert len(replays) == 2


def test_what_the_reference_computes_is_not_replayed(replays):
    """A coefficient over channels; and a tensor of other memory, which torch copies first."""
    for seed in range(3):
        x, y = inputs(seed)
        weights = torch.linspace(0, 1, 4).view(1, 4, 1, 1)
        found = settle(Lin.of(x) * weights + Lin.of(y))
        assert torch.equal(found, x * weights + y)
        halves = torch.tensor([0.5, 0.25], dtype=torch.float16)
        assert torch.equal(settle(Lin.of(x) * halves), x * halves.float().view(2, 1, 1, 1))
    assert not replays


def test_a_structure_is_kept_once_it_came_often(monkeypatch, replays):
    monkeypatch.setattr(replay, "OFTEN", 4)
    for seed in range(6):
        with dry_run():
            settle(lazy(*inputs(seed)))
        assert len(replays) == max(0, seed - 3)
    assert max(len(seen.known) for seen in replay._settled.values()) == 1


def test_only_the_latest_structures_are_kept(replays):
    for rows in range(1, 12):
        with dry_run():
            settle(lazy(*inputs(rows=rows)))
    assert [len(seen.known) for seen in replay._settled.values()] == [8]
