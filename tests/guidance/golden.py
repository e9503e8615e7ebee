"""The golden vectors of the guidance rules (see tests/golden/guidance/README.md), and how close."""

from pathlib import Path

import numpy as np
import torch

from sampler.types import Level, Prediction, Span

FOLDER = Path(__file__).parents[1] / "golden" / "guidance"
END = Level(0, 1.0, 0.0)


def load(name):
    return np.load(FOLDER / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.as_tensor(np.asarray(array), dtype=dtype)


def relative(found, expected):
    """‖found − expected‖ / ‖expected‖, in float64."""
    expected = torch.as_tensor(np.asarray(expected)).double()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def span(index=0, alpha=0.6, sigma=0.8):
    return Span(index, Level(500, alpha, sigma), END)


def preds(kind="eps", at=None, x=None, **values):
    """Predictions of one kind at x (zeros if not given), by branch name."""
    at = at or span()
    first = next(iter(values.values()))
    x = torch.zeros_like(first) if x is None else x
    return x, {name: Prediction.of(kind, x, v, at.now) for name, v in values.items()}


def combine(rule, at=None, state=None, kind="eps", x=None, **values):
    """(out tensor in the network's own parametrisation, next state) of one combine."""
    at = at or span()
    x, predictions = preds(kind, at, x, **values)
    guided, state = rule.combine(x, predictions, at, state)
    value = guided.out if guided.kind == kind else getattr(guided, kind)
    return value.tensor(), state
