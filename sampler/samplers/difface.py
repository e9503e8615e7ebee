"""DifFace: a run that starts from the output of another restorer, noised to a middle level."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Gt, Le

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.samplers.measurement import Measurement, Range, measurement
from sampler.types import Level, Move, Prediction, SamplerBase, Span

if TYPE_CHECKING:
    from torch import Tensor

RESTORERS = ("pseudo_inverse", "bicubic")


@register("sampler", "difface")
@dataclass(frozen=True, eq=False)
class DifFace(SamplerBase):
    """DifFace: the last steps of any sampler, from a restorer's output with noise.

        x_N = alpha_N·R(y) + sigma_N·n,   n ~ N(0, I);   then the inner sampler from N to 0

    N is the first of the last floor(strength·steps) steps, one at least. The error of the
    restorer is contracted: KL(q(x_N|x0) ‖ p(x_N|y)) = alpha_N²·‖x0 − R(y)‖²/(2·sigma_N²). More
    strength makes images more plausible and takes them further from y.

    operator, y, space, data_range: as for `reddiff`; the operator serves the restorers
        "pseudo_inverse" and "bicubic" alone, others need none ("denoise" then).
    restorer: "pseudo_inverse", the operator's A_dagger(y); "bicubic", y resized to the size of the
        run; the file of an image that any program has restored; or a function from images
        [B, 3, H, W] in [0, 1] to images.
    strength: share of the steps that is walked; 0.4 as published, 0.48 for holes.
    sampler: the inner sampler; `ddim` with eta 0.5 as published.
    """

    operator: Any
    y: Any
    restorer: Any = "pseudo_inverse"
    strength: Annotated[float, Gt(0), Le(1)] = 0.4
    sampler: Any = field(
        default_factory=lambda: {"name": "ddim", "eta": 0.5}, metadata={"kind": "sampler"}
    )
    space: Literal["model", "image"] = "model"
    data_range: Range | None = None

    reference: ClassVar[str] = (
        "DifFace: Blind Face Restoration with Diffused Error Contraction (Yue & Loy, 2022), "
        "arXiv:2212.06512, eq. 5"
    )

    def __post_init__(self) -> None:
        start: Any = None
        if callable(self.restorer):
            start = _of_function(self.restorer, self.y)
        elif self.restorer == "bicubic":
            pass  # the size is that of the run
        elif self.restorer != "pseudo_inverse":
            start = _of_file(self.restorer)
        needs = self.restorer == "pseudo_inverse"
        operator = self.operator if needs or start is None else "denoise"
        y = self.y if start is None else start
        made = measurement(operator, y, start, self.data_range, self.name, needs_start=needs)
        object.__setattr__(self, "_measured", made)
        object.__setattr__(self, "_first", None)

    @property
    def convergence(self) -> None:
        return None

    @property
    def stochastic(self) -> bool:
        return self.sampler.stochastic

    @property
    def evaluations(self) -> int:
        return self.sampler.evaluations

    def bind(self, context: SamplerContext) -> DifFace:
        """The inner sampler bound, and the restorer's output as latents of the run's size."""
        cut = replace(context, levels=self._last(tuple(context.levels)))
        bound, measured = replace(self, sampler=self.sampler.bind(cut)), self._measurement
        if measured.init is None:
            measured = replace(measured, init=_bicubic(measured.y, context.size))
        if self.space == "image":
            measured = measured.through(context.adapter, context.size)
        object.__setattr__(bound, "_measured", measured)
        object.__setattr__(bound, "_first", context.levels[0])
        return bound

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        return self.sampler.levels(self._last(grid))

    def start(self, x: Any, level: Level) -> tuple[Any, Any]:
        measured = self._measurement
        if measured.init is None or (self.space == "image" and not measured.decoded):
            raise ValueError(
                "difface: space = 'image' and restorer = 'bicubic' need generate(), whose pipeline "
                "has a size and an encoder."
            )
        first = vars(self)["_first"] or level
        unit = x / math.hypot(first.alpha, first.sigma)  # the first noise, unscaled
        query = level.alpha * measured.start(x) + level.sigma * unit
        return self.sampler.start(query, level)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        return self.sampler.step(x, pred, span, state)

    def finish(self, x: Any, state: Any) -> Any:
        return self.sampler.finish(x, state)

    def _last(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The levels from N to the end."""
        steps = len(grid) - 1
        return grid[steps - max(1, int(self.strength * steps + 1e-9)) :]

    @property
    def _measurement(self) -> Measurement:
        return vars(self)["_measured"]


def contraction(levels: tuple[Level, ...]) -> float:
    """alpha_N²/sigma_N² of a walked grid: remaining fraction of a restorer's squared error."""
    return (levels[0].alpha / levels[0].sigma) ** 2


def _of_function(restorer: Any, y: Any) -> Tensor:
    from sampler.core.images import read

    images = read(y) if isinstance(y, str) else y / 2 + 0.5
    found: Any = restorer(images)
    if getattr(found, "ndim", 0) != 4:
        raise ValueError("difface: the restorer must return images [B, 3, H, W] in [0, 1].")
    return cast("Tensor", found) * 2 - 1


def _of_file(restorer: Any) -> Tensor:
    from sampler.core.images import read

    if not isinstance(restorer, str) or not Path(restorer).is_file():
        raise ValueError(
            f"difface: restorer = {restorer!r:.60} must be {' or '.join(map(repr, RESTORERS))}, an "
            "image file, or a function."
        )
    return read(restorer) * 2 - 1


def _bicubic(y: Tensor, size: tuple[int, int]) -> Tensor:
    import torch.nn.functional as F

    if y.ndim != 4 or y.shape[1] != 3:
        raise ValueError("difface: restorer = 'bicubic' needs a y that is an image; use another.")
    return F.interpolate(y, size, mode="bicubic").clamp(-1, 1)
