"""Derivatives and torch.compile: the custom operators, and whole steps through both backends."""

import pytest
import torch
from sampler_kernels import Lin, fused, gram, leaves, settle, use_backend
from sampler_kernels.counting import count_launches
from sampler_kernels.programs import Formula
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from sampler import registry
from sampler.types import Cond, Level, Prediction, Span
from tests.kernels.canary import watched

NO_COND = Cond()
SPAN = Span(3, Level(500, 0.6, 0.8), Level(400, 0.8, 0.6))


def draw(*shape, seed=0, dtype=torch.float32, grad=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def example(dtype):
    """The operands of both operators for a formula that has every kind of node."""
    xs = [draw(2, 5, seed=s, dtype=dtype) for s in range(3)]
    per_row = [torch.ones(2), torch.ones(2) * 2]
    a = Lin.of(xs[0]) * per_row[0] - (Lin.of(xs[1]) - xs[2]) / 0.7
    b = (a * 1.3 + Lin.of(xs[2]) / per_row[1]) * per_row[0] + Lin.ones(xs[0]) * 0.4
    formula = Formula([a, b, Lin.of(xs[2])])
    table = (draw(2, 2, seed=9, dtype=dtype).detach().abs() + 0.5).requires_grad_()
    return xs, table, formula


def operators(formula):
    a, b, c = formula.outs
    ends = [a, b, b, b, c, a]
    rest = (formula.code, formula.consts)
    return (
        lambda table, *xs: tuple(fused.formula_op(list(xs), table, *rest, formula.outs)),
        lambda table, *xs: fused.gram_op(list(xs), table, *rest, ends),
    )


@pytest.mark.parametrize("which", [0, 1], ids=["formula", "gram"])
def test_gradcheck(which):
    xs, table, formula = example(torch.float64)
    operator = operators(formula)[which]
    assert gradcheck(operator, (table, *xs))
    assert gradgradcheck(operator, (table, *xs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    xs, table, formula = example(dtype)
    rest = (formula.code, formula.consts)
    opcheck(fused.formula_op, (xs, table, *rest, formula.outs))
    opcheck(fused.gram_op, (xs, table, *rest, formula.outs[:2]))


def step(rule, method, x, c, u):
    """A guided step as the engine takes it: the next x, and the states."""
    preds = {"cond": Prediction.from_v(x, c, SPAN.now), "uncond": Prediction.from_v(x, u, SPAN.now)}
    pred, g = rule.combine(x, preds, SPAN, rule.start(NO_COND))
    move = method.step(x, pred, SPAN, ())
    return settle((move.mean, move.state, g))


def built(rule, method):
    return registry.build("guidance", rule), registry.build("sampler", method)


CASES = {
    "cfg + ddim": ({"name": "cfg", "scale": 4.0}, "ddim"),
    "rescaled cfg + dpmpp_2m": ({"name": "cfg", "rescale": 0.7}, "dpmpp_2m"),
    "apg + ghvb": ({"name": "apg", "momentum": -0.5, "norm_threshold": 2.0}, "ghvb"),
    "apg over an axis": ({"name": "apg", "norm_threshold": 2.0, "axes": (-1,)}, "ddim"),
    "cfg_zero + ddim": ("cfg_zero", "ddim"),
    "adaptive + ddim": ({"name": "adaptive", "after": "hold"}, "ddim"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_step(monkeypatch, name, dtype):
    """Forward and backward on the kernels, against autograd through the reference."""
    rule, method = built(*CASES[name])
    x, c, u = draw(2, 3, 50), draw(2, 3, 50, seed=1, dtype=dtype), draw(2, 3, 50, seed=2)

    def gradients():
        out, *states = step(rule, method, x, c, u)
        loss = out.square().mean() + sum(
            s.sin().mean() for s in leaves(states) if hasattr(s, "sin")
        )
        return torch.autograd.grad(loss, (x, c, u))

    with use_backend("reference"):
        right = gradients()
    canary = watched(monkeypatch)
    with use_backend("triton"):
        mine = gradients()
    canary.check()
    for a, b in zip(right, mine, strict=True):
        assert a.dtype == b.dtype
        tolerance = 2e-3 if a.dtype == torch.float16 else 2e-5
        assert (a - b).norm() <= tolerance * a.norm()


def test_the_backward_pass_is_kernels_too():
    x, y = draw(2, 40), draw(2, 40, seed=1)
    with use_backend("triton"), count_launches() as launches:
        products = gram(x, y)
        loss = settle(Lin.of(x) * (products[0, 1] / products[1, 1]) - y).square().sum()
        forward = len(launches)
        loss.backward()
    kinds = {k.kernel for k in launches[forward:]}
    assert forward == 3 and kinds == {"formula", "gram", "scalar"}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_compiles_into_one_graph(name, backend):
    rule, method = built(*CASES[name])
    x, c, u = (draw(2, 3, 50, seed=s, grad=False) for s in range(3))

    def fn(x, c, u):
        return step(rule, method, x, c, u)[0]

    with use_backend(backend), torch.no_grad():
        right = fn(x, c, u)
        torch.compiler.reset()
        mine = torch.compile(fn, fullgraph=True, backend="aot_eager")(x, c, u)
    assert (right - mine).norm() <= 1e-6 * right.norm()


def test_sums_of_lazy_values_and_tensors_compile():
    """Either may come first; while torch.compile traces, torch sees the operators of both."""

    def fn(x, y):
        lin = Lin.of(x) * 2.0
        return settle([lin - y, y - lin, lin + y, y + lin])

    x, y = draw(2, 9, grad=False), draw(2, 9, seed=1, grad=False)
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="eager")
    for mine, right in zip(compiled(x, y), fn(x, y), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_first_used_in_inference_mode_serve_a_backward_pass(dtype):
    """Numbers are kept as tensors, and autograd refuses tensors that inference mode made."""
    number = 0.3712345
    with torch.inference_mode():
        settle(Lin.of(torch.ones(2, 3, dtype=dtype)) * number)
    x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    settle(Lin.of(x) * number).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, number))
