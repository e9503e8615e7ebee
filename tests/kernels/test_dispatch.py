"""Choice of the backend: requested, possible, and the message when the two differ."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from sampler_kernels import (
    Lin,
    choice,
    fused,
    gram,
    probe,
    selection,
    settle,
    torch_ops,
    use_backend,
)
from sampler_kernels.backend import backend
from sampler_kernels.counting import count_launches

X = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh():
    """No memory of earlier probes."""
    selection.works.cache_clear()
    yield
    selection.works.cache_clear()


def test_the_cpu_and_float64_are_the_reference():
    assert backend(X) is torch_ops
    with use_backend("triton"):
        assert backend(X) is fused
        assert backend(X.double()) is torch_ops
        assert settle(Lin.of(X.double()) * 0.1).dtype == torch.float64


def test_the_environment_chooses_and_use_backend_wins(monkeypatch):
    monkeypatch.setattr(choice, "_default", "triton")
    assert backend(X) is fused
    with use_backend("reference"):
        assert backend(X) is torch_ops
        with use_backend("auto"):
            assert backend(X) is torch_ops
    monkeypatch.setattr(choice, "_default", "fast")
    with pytest.raises(ValueError, match="SAMPLER_KERNELS.*'fast'.*auto, reference, triton"):
        backend(X)
    with pytest.raises(ValueError, match="use_backend"), use_backend("cuda"):
        pass


def test_the_environment_variable_is_read_at_import():
    code = "from sampler_kernels import choice; print(choice.requested())"
    environment = {**os.environ, "SAMPLER_KERNELS": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == "reference", done.stderr


def fails(device):
    raise OSError("no compiler\nsecond line")


def answers_wrongly(lins, dtype=None):
    return [value + 1e-3 for value in torch_ops.settle(lins, dtype)]


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_a_broken_triton_is_said_once_and_replaced(monkeypatch, broken):
    if broken == "missing":
        monkeypatch.setattr(probe, "check", fails)
    else:
        monkeypatch.setattr(probe.fused, "settle", answers_wrongly)
    with use_backend("triton"):
        with pytest.warns(RuntimeWarning, match="no compiler|wrong result") as said:
            value = settle(Lin.of(X) * 2.0)
        assert len(said) == 1 and torch.equal(value, X * 2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(gram(X)[0, 0], torch_ops.gram([Lin.of(X)], None)[0, 0])


def test_what_triton_cannot_do_is_left_to_the_reference():
    five = [X * k for k in range(1, 6)]
    images = X.view(2, 2, 4, 5)
    odd = torch.rand(2, 1, 4, 1)
    cases = {
        "more than four vectors": lambda: gram(*five),
        "axes that do not trail": lambda: gram(images, axes=(1,)),
        "coefficients that do not lead": lambda: settle(Lin.of(images) * odd + images),
        "two types": lambda: settle(Lin.of(X) + X.double()),
    }
    for name, make in cases.items():
        with use_backend("reference"):
            right = make()
        with use_backend("triton"), count_launches() as launches:
            mine = make()
        assert torch.equal(torch.as_tensor(mine), right) and not launches, name
