"""The Triton backend by its interpreter: formulas, sums, recorded scalars, awkward inputs."""

import math

import pytest
import torch
from sampler_kernels import Lin, gram, recorded, settle, use_backend, where
from sampler_kernels.counting import count_launches

from tests.kernels.canary import watched


@pytest.fixture(autouse=True)
def canary(monkeypatch):
    """Every test runs on Triton, with watched outputs."""
    found = watched(monkeypatch)
    with use_backend("triton"):
        yield found
    found.check()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(make):
    with use_backend("reference"):
        return make()


def relative(value, right):
    return float((value.double() - right.double()).norm() / right.double().norm())


def test_a_formula_is_the_reference_bit_for_bit():
    x, y, z = (draw(2, 3, 700, seed=s) for s in range(3))
    per_row = torch.tensor([0.3, -1.7])

    def make():
        a = 0.1 * Lin.of(x) - (Lin.of(y) - z) / 0.7
        return settle({"a": a, "b": (a * per_row + Lin.of(z) / per_row) * 3.0 - Lin.ones(x) * 0.2})

    right, mine = reference(make), make()
    assert all(torch.equal(right[k], mine[k]) for k in right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(dtype):
    """One rounding, at the store. The interpreter truncates to bfloat16 instead of rounding."""
    x, y = draw(2, 3000, dtype=dtype), draw(2, 3000, seed=1, dtype=dtype)
    make = Lin.of(y) + 7.5 * (Lin.of(x) - y)
    exact = y.double() + 7.5 * (x.double() - y.double())
    assert torch.equal(settle(make), reference(lambda: settle(make)))
    rounding = relative(exact.to(dtype), exact)
    slack = 1.05 if dtype == torch.float16 else 2.1
    assert make.tensor(dtype).dtype == dtype
    assert relative(make.tensor(dtype), exact) <= slack * rounding


def test_inputs_in_any_memory_layout():
    """Kernels read raw memory; what is not contiguous has to be copied first."""
    base = draw(2, 4, 6, 10)
    views = {
        "channels last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": draw(2, 4, 6, 20)[..., ::2],
        "expanded": draw(1, 4, 6, 10).expand(2, 4, 6, 10),
        "shifted": draw(2 * 240 + 1)[1:].view(2, 4, 6, 10),
    }
    for name, view in views.items():
        value = settle(2.0 * Lin.of(view) - base)
        assert torch.equal(value, 2.0 * view - base), name


def test_inner_products_are_accurate_and_form_differences_first():
    c = draw(2, 5000)
    u = c + 1e-3 * draw(2, 5000, seed=1)
    products = gram(Lin.of(c) - u, c).tensor()
    d = c.double() - u.double()
    right = torch.stack([(a * b).sum(1) for a in (d, c.double()) for b in (d, c.double())])
    scale = torch.stack([a.norm(dim=1) * b.norm(dim=1) for a in (d, c) for b in (d, c)])
    assert ((products.view(4, 2) - right).abs() / scale).max() < 1e-6


def test_a_row_depends_on_nothing_but_itself():
    x, y = draw(5, 6000), draw(5, 6000, seed=1)

    def make(rows):
        a, b = Lin.of(x[rows]), Lin.of(y[rows])
        products = gram(a, b)
        return settle(a - b * (products[0, 1] / products[1, 1].sqrt()))

    whole = make(slice(None))
    assert torch.equal(whole, make(slice(None)))
    assert torch.equal(whole[3:4], make([3]))
    assert torch.equal(whole.flip(0), make([4, 3, 2, 1, 0]))


def test_what_is_wrong_in_one_row_stays_there():
    x, y = draw(3, 2500), draw(3, 2500, seed=1)
    clean = x.clone()
    x[1, 7], x[2] = math.nan, 0.0

    def make(x):
        products = gram(x, y)
        return settle(Lin.of(y) + Lin.of(x) * (products[0, 1] / products[0, 0]))

    found = make(x)
    assert found[1:].isnan().all()
    assert torch.equal(found[0], make(clean)[0])


def test_wide_formulas_and_many_outputs_are_split():
    xs = [draw(2, 100, seed=s) for s in range(20)]
    total = Lin.of(xs[0])
    for k, x in enumerate(xs[1:]):
        total = total + (0.1 * k + 0.5) * Lin.of(x)
    lins = [total, *(Lin.of(a) - b for a, b in zip(xs[:-1], xs[1:], strict=True))]
    right = reference(lambda: settle(lins))
    with count_launches() as launches:
        mine = settle(lins)
    assert all(torch.equal(a, b) for a, b in zip(right, mine, strict=True))
    assert all(k.read <= 8 * 800 and k.written <= 4 * 800 for k in launches)


def test_constants_alone():
    x = draw(2, 9)
    assert torch.equal(settle(Lin.ones(x) * 0.5 + x), x + 0.5)
    assert torch.equal(settle([Lin.ones(x), Lin.zero(x)])[0], torch.ones(2, 9))
    sums = gram(x, Lin.ones(x))
    assert torch.allclose(sums[0][1].tensor(), x.sum(1), atol=1e-5)


SCALARS = {
    "algebra": lambda a, b: (2.0 - a * 3.0) / (b + 1.0) - 1.0 / a,
    "squares": lambda a, b: (a**2 + b.square() - -a).sqrt() * (a * a) ** 0.5,
    "clamp": lambda a, b: a.clamp(min=0.2) + b.clamp(-0.5, 0.5) + a.clamp(max=0.0),
    "abs": lambda a, b: a.abs() - (b - 1.0).abs(),
    "where": lambda a, b: where(a < b, a, 2.0) + where(a >= b, b, a * b),
    "logic": lambda a, b: where((a < b) & ~(b == a) | (a > 2.0), 1.0, b),
    "not equal": lambda a, b: where(a != b, a, b) + where(a <= 0.0, 1.0, 0.0),
    "other functions": lambda a, b: torch.minimum(a, b).log1p() + a.exp() * torch.tensor(2.0),
    "with a tensor": lambda a, b: torch.tensor([1.0, 2.0, 3.0]) * a - b * torch.ones(3),
    "with a wider tensor": lambda a, b: a * torch.ones(2, 3) + b + torch.ones(1) * a,
    "ties": lambda a, b: where(a < a, 5.0, b) + where(b <= b, a, 5.0) * where(a > a, 5.0, 1.0),
    "power": lambda a, b: a.abs() ** 1.5 + b**3,
}


@pytest.mark.parametrize("name", SCALARS)
def test_recorded_scalars_are_what_torch_makes_of_them(name):
    x, y = draw(3, 20), draw(3, 20, seed=1)
    products = gram(x, y)
    a, b = products[0, 1], products[1, 1] / 20.0
    value = SCALARS[name](a, b)
    right = SCALARS[name](a.tensor().clone(), b.tensor().clone())
    assert torch.allclose(torch.as_tensor(settle(value)), right, rtol=1e-6, atol=1e-7)


def test_a_recorded_scalar_behaves_as_a_tensor():
    x = draw(3, 20)
    products = gram(x, x * 2)
    a = products[0, 1]
    known = a.tensor()
    assert (a.shape, a.ndim, a.dtype, len(a)) == ((3,), 1, torch.float32, 3)
    assert torch.equal(torch.stack([a, a])[1], known) and torch.equal(a.cpu(), known)
    assert float(a[1]) == float(known[1]) and [float(v) for v in a] == known.tolist()
    assert (a > 1e9).dtype == torch.bool and not (a > 1e9).any()
    assert products[:, 0].shape == (2, 3) and products.shape == (2, 2, 3)
    (p, q), _ = products
    assert torch.equal(q.tensor(), known) and torch.equal(p.tensor() * 2, known)
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(a)
    nan = gram(torch.full((1, 4), math.nan))[0, 0]
    assert nan.clamp(max=1.0).tensor().isnan() and not (nan == nan).tensor()


def test_scalars_of_one_step_take_one_launch():
    x, y, z = (draw(3, 50, seed=s) for s in range(3))
    with count_launches() as launches:
        products = gram(x, y)
        cosine = products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()
        settle((Lin.of(z) + Lin.of(x) * cosine * cosine - Lin.of(y) / products[0, 0], Lin.of(x)))
    assert [k.kernel for k in launches] == ["gram", "scalar", "formula"]


@pytest.mark.parametrize("n", [1, 7, 1000, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_only_the_next_step_needs_is_summed_while_this_one_is_computed(n, dtype):
    """The same bits as in passes of their own; also two reductions, and one that is needed now."""
    x, y, z = (draw(3, n, seed=s, dtype=dtype) for s in range(3))
    per_row = torch.tensor([0.3, -1.7, 2.0])

    def make():
        d = Lin.of(x) - y
        now, late, last = gram(d, z), gram(d * per_row, x), gram(Lin.of(y) - z)
        step = Lin.of(x) * 3.0 + d * (now[0, 1] / now[1, 1])
        return {"x": step, "y": d * 0.5 + z, "late": late, "last": last}

    apart = {k: settle(v) for k, v in make().items() if k != "late"}
    apart["late"] = make()["late"].tensor()
    with count_launches() as launches:
        together = settle(make())
    assert [k.kernel for k in launches] == ["gram", "scalar", "both", "scalar"]
    for k, value in apart.items():
        assert torch.allclose(torch.as_tensor(together[k]), torch.as_tensor(value), 0, 0, True), k
    right = reference(make)
    exact = torch.as_tensor(settle(right["last"]))
    assert torch.allclose(torch.as_tensor(together["last"]), exact, rtol=1e-6)


def test_a_reduction_that_the_step_needs_is_made_once():
    x, y = draw(2, 300), draw(2, 300, seed=1)
    with count_launches() as launches:
        products = gram(x, y)
        step, left = settle((Lin.of(x) - Lin.of(y) * products[0, 1], products[0, 0]))
    assert [k.kernel for k in launches] == ["gram", "scalar", "formula", "scalar"]
    assert torch.allclose(left, x.square().sum(1), rtol=1e-6) and step.shape == x.shape


def test_a_reduction_over_other_tensors_or_rows_stays_alone():
    x, y = draw(2, 4, 30), draw(2, 4, 30, seed=1)
    for make in (lambda: gram(Lin.of(y))[0, 0], lambda: gram(Lin.of(x), axes=(2,))[0, 0]):
        with count_launches() as launches:
            found = settle((Lin.of(x) * 2.0, make()))
        assert "both" not in [k.kernel for k in launches]
        assert torch.allclose(found[1], settle(reference(make)), rtol=1e-6)


def test_recorded_tensors_are_tensors_whose_arithmetic_waits():
    flag, x = torch.tensor([1.0, 0.0, 1.0]), draw(3, 8)
    with count_launches() as launches:
        weight = recorded(flag, x)
        value = settle(Lin.of(x) * weight + Lin.of(x) * 2.0 * (1 - weight))
    assert [k.kernel for k in launches] == ["scalar", "formula"]
    assert torch.equal(value, torch.where(flag[:, None] > 0, x, 2 * x))
    leaf = flag.clone().requires_grad_()
    assert recorded(leaf, x) is leaf and reference(lambda: recorded(flag, x)) is flag
