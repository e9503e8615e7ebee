"""LinearAG's coefficients: their file, what they are valid for, and the least-squares fit.

    û_t = Σ_{i<=t} a[t][i]·c_i + Σ_{i<t} b[t][i]·u_i      i counts the steps of a run from 0

c_i, u_i are the network's own outputs at step i, u_i real or itself predicted; the scalars a, b
are the same for all elements of all images, and there is no intercept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sampler import registry
from sampler.core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

BUNDLED = Path(__file__).resolve().parents[1] / "bundled" / "linear_ag.json"
FORMAT = "sampler.linear_ag/1"
RIDGE = 1e-6
"""Times the mean diagonal of the normal equations: neighbouring steps are almost collinear. Best
of 1e-6 to 1e-2 on the bundled model; with 1e-2 the regression is worse than holding c − u."""

LEVELS = 1e-5
"""By how much a level may differ from that of the fit: six digits are stored, the last one open."""

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Coefficients:
    """a[t]: t + 1 numbers; b[t]: t numbers; keys: what they were fitted for.

    keys, all optional: model (fingerprint), sampler (spec), levels ([alpha, sigma] per step),
    scale, negative, prediction, policy (1 or 0 per step).
    """

    cond: Rows
    uncond: Rows
    keys: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        sizes = [(len(a), len(b)) for a, b in zip(self.cond, self.uncond, strict=True)]
        if not sizes or sizes != [(t + 1, t) for t in range(len(sizes))]:
            raise ValueError(
                "linear_ag: coefficients need t + 1 numbers for c and t for u at every step t."
            )

    @property
    def steps(self) -> int:
        return len(self.cond)

    def save(self, path: Path | str) -> None:
        """Writes the JSON file that `load` reads."""
        document = {"format": FORMAT, "keys": self.keys, "cond": self.cond, "uncond": self.uncond}
        Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path | str) -> Coefficients:
        """Raises SamplerError (6) for a file that is missing or has no coefficients."""
        path = BUNDLED if path == "bundled" else Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError(f"format is {document['format']!r}")
            return Coefficients(
                _rows(document["cond"]), _rows(document["uncond"]), document["keys"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{path} is not a LinearAG coefficients file ({error}); make one with "
                "`sampler calibrate linear-ag`.",
            ) from error

    def refuse(self, **found: Any) -> None:
        """Raises ValueError where one of these differs from what the coefficients were fitted for.

        A key that either side does not know is not compared.
        """
        for key, value in found.items():
            fitted = self.keys.get(key)
            if key == "sampler" and fitted is not None:  # with the defaults of later fields
                fitted = registry.spec_of(registry.build("sampler", fitted))
            if fitted is not None and value is not None and not agree(fitted, value):
                differ = f"{key} = {fitted!r:.80}, not {value!r:.80}"
                if key == "levels":  # their numbers would say nothing
                    same = len(fitted) == len(value)
                    differ = "other levels" if same else f"{len(fitted)} levels, not {len(value)}"
                raise ValueError(
                    f"linear_ag: the coefficients were fitted for {differ}; run `sampler calibrate "
                    "linear-ag` for this setting."
                )


def _rows(values: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values)


def agree(fitted: Any, found: Any) -> bool:
    """Compare two values of a key, numbers in lists to what float32 levels differ by
    between processors: a schedule is a float32 product of a thousand factors."""
    if isinstance(fitted, (list, tuple)) and isinstance(found, (list, tuple)):
        a, b = cast("Sequence[Any]", fitted), cast("Sequence[Any]", found)
        return len(a) == len(b) and all(map(agree, a, b))
    if isinstance(fitted, float) and isinstance(found, float):
        return abs(fitted - found) <= LEVELS
    return fitted == found


def gram_of(cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> Tensor:
    """Inner products [2T, 2T], float64, of one run's c_0..c_{T−1}, u_0..u_{T−1}, each [B, ...].

    Sums over rows and elements: the matrices of several batches add up.
    """
    import torch

    features = torch.stack([v.double().flatten() for v in (*cond, *uncond)])
    return features @ features.T


def solve(
    gram: Tensor,
    keys: Mapping[str, Any],
    policy: Sequence[int] | None = None,
    ridge: float = RIDGE,
) -> Coefficients:
    """Least squares for every step from the inner products [2T, 2T] of full CFG runs.

    For step t the features are c_0..c_t, u_0..u_{t−1}, the target is u_t; `ridge` times the mean
    diagonal is added to the diagonal. With a policy, u_i is the prediction û_i wherever the policy
    predicts it, so that each step is fitted on what it will be given, and errors are not amplified
    from step to step; without one all u_i are the real ones.
    """
    import torch

    steps = gram.shape[0] // 2
    # row i: feature i as a combination of the real c and u
    features = torch.eye(2 * steps, dtype=torch.float64)
    cond: list[tuple[float, ...]] = []
    uncond: list[tuple[float, ...]] = []
    for t in range(steps):
        used = features[[*range(t + 1), *range(steps, steps + t)]]
        matrix, target = used @ gram @ used.T, used @ gram[:, steps + t]
        damping = ridge * matrix.trace() / len(used)
        matrix = matrix + damping * torch.eye(len(used), dtype=torch.float64)
        weights: Tensor = (
            cast(Any, torch.linalg).lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
        )
        numbers: list[float] = cast(Any, weights).tolist()
        cond.append(tuple(numbers[: t + 1]))
        uncond.append(tuple(numbers[t + 1 :]))
        if policy is not None and not policy[t]:
            features[steps + t] = weights @ used
    if policy is not None:
        keys = {**keys, "policy": [int(p) for p in policy]}
    return Coefficients(tuple(cond), tuple(uncond), dict(keys))
