"""Large latents on a CPU: compiled formulas, the same bits, and what is left uncompiled."""

import warnings

import pytest
import torch
from sampler_kernels import Lin, backend, compiled, gram, leaves, settle, torch_ops, use_backend
from sampler_kernels.backend import LARGE

from sampler.core.benchmark import CASES, Step


@pytest.fixture(autouse=True)
def fresh():
    """No memory of earlier programs and warnings."""
    compiled._program.cache_clear()
    compiled._say.cache_clear()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_large_latents_on_a_cpu_are_compiled_and_nothing_else(monkeypatch):
    large = torch.empty(2, LARGE // 2)
    assert backend.backend(large) is compiled
    assert (
        backend.backend(large[:, 1:]) is torch_ops and backend.backend(large.double()) is torch_ops
    )
    assert backend.backend(torch.empty(2, LARGE // 2, device="meta")) is torch_ops
    with use_backend("reference"):
        assert backend.backend(large) is torch_ops
    monkeypatch.setenv("SAMPLER_KERNELS", "reference")
    assert backend.backend(large) is torch_ops


@pytest.mark.parametrize("name", ["CFG + DPM-Solver++(2M)", "APG + DDIM", "CFG rescaled + DDIM"])
def test_a_compiled_step_is_the_reference_bit_for_bit(name, monkeypatch):
    """Two latents of SD3's size, in half precision; also one row of them, which is not compiled."""
    step = Step(next(case for case in CASES if case.name == name), (2, LARGE // 2))
    calls = []
    run = compiled.Program.__call__
    monkeypatch.setattr(
        compiled.Program, "__call__", lambda self, *a: calls.append(run(self, *a)) or calls[-1]
    )
    with torch.no_grad():
        with use_backend("reference"):
            right = step()
        mine = [step() for _ in range(3)]
    assert calls[0] is None and calls[-1] is not None
    for found in mine:
        pairs = list(zip(leaves(right), leaves(found), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_every_kind_of_node_compiles_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(backend, "LARGE", 1)
    x, y, z = (draw(3, 4, 50, seed=s, dtype=d) for s, d in enumerate(
        (torch.float32, torch.float16, torch.bfloat16)))  # fmt: skip
    per_row, fine = torch.tensor([0.3, -1.7, 2.0]), draw(3, 4, 1, seed=5)

    def make():
        a = 0.1 * Lin.of(x) - (Lin.of(y) - z) / 0.7
        b = (a * per_row + Lin.of(z) / per_row) * fine - Lin.ones(x) * 0.2
        return settle([a, b, Lin.of(y), Lin.ones(x), b.tensor(torch.float16)]), gram(
            a, b, Lin.ones(x)
        ), gram(b, a, axes=(2,))  # fmt: skip

    with use_backend("reference"):
        right = make()
    for _ in range(2):
        pairs = zip(leaves(list(right)), leaves(list(make())), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    programs = compiled._program.cache_info().currsize
    assert programs >= 3


def test_gradients_and_traces_are_the_references(monkeypatch):
    monkeypatch.setattr(backend, "LARGE", 1)
    x = draw(2, 9).requires_grad_()
    for _ in range(3):
        (settle(Lin.of(x) * 2.0 - x / 3.0)).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 3 * (2 - 1 / 3)))
    assert compiled._program.cache_info().currsize == 0
    torch.compiler.reset()
    fn = torch.compile(lambda t: settle(Lin.of(t) * 2.0 - t), fullgraph=True, backend="eager")
    assert torch.equal(fn(draw(2, 9)), draw(2, 9))
    assert compiled._program.cache_info().currsize == 0


def test_without_a_compiler_one_warning_and_the_reference(monkeypatch):
    tried = []

    def absent(*args):
        tried.append(args)
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(backend, "LARGE", 1)
    monkeypatch.setattr(compiled.torch, "compile", lambda fn, **options: absent)
    x = draw(2, 9)
    assert torch.equal(settle(Lin.of(x) * 2.0), 2 * x)
    with pytest.warns(RuntimeWarning, match="No working C.. compiler found.*=reference") as said:
        assert torch.equal(settle(Lin.of(x) * 2.0), 2 * x)
    assert len(said) == 1
    settle(Lin.of(x) * 2.0)
    assert len(tried) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(settle(Lin.of(x) * 2.0 + x), 2 * x + x)
            assert torch.equal(gram(x), torch_ops.gram([Lin.of(x)], None))
