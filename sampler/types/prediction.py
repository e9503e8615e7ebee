"""One network output, convertible between the parametrisations eps, v, x0 and velocity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sampler_kernels import Lin

from sampler.types.values import Level

if TYPE_CHECKING:
    from torch import Tensor

    Values = Tensor | Lin
    Scalar = float | Tensor

KINDS = ("eps", "v", "x0", "velocity")


@dataclass(frozen=True)
class Prediction:
    """One network output, or a guided one, convertible between parametrisations exactly and lazily.

    `out` is the value in the network's own parametrisation `kind`: "eps", "v", "x0" or
    "velocity". `direction`, where a rule sets it, replaces `eps` alone: samplers take the target
    from `.x0` and the direction from `.eps` (CFG++ keeps the two apart). `seen`: answer to the
    `Watch` of a branch, maps {layer: [R, N, T]} of N image tokens on T text tokens, in the rows
    that were evaluated.

    x0 = (x − sigma·eps) / alpha;   x0 = alpha·x − sigma·v;   x0 = x − sigma·velocity (flow).
    """

    x: Lin
    out: Lin
    kind: str
    level: Level
    direction: Lin | None = None
    seen: Any = None

    def __init__(
        self,
        x: Lin,
        out: Lin,
        kind: str,
        level: Level,
        direction: Lin | None = None,
        seen: Any = None,
    ) -> None:
        # A frozen dataclass sets its fields one by one, which takes as long as a tensor operation.
        self.__dict__.update(x=x, out=out, kind=kind, level=level, direction=direction, seen=seen)

    @staticmethod
    def of(kind: str, x: Values, out: Values, level: Level) -> Prediction:
        """From a network output `out` [B, ...] of the given kind at `x` [B, ...].

        Raises ValueError for an unknown kind, and for an eps-prediction at alpha = 0, where x0
        would be a division by 0.
        """
        if kind not in KINDS:
            raise ValueError(f"Unknown prediction type {kind!r}; one of {', '.join(KINDS)}.")
        if kind == "eps" and isinstance(level.alpha, float) and level.alpha == 0.0:
            raise ValueError(
                f"An eps-prediction says nothing about x0 at alpha = 0 (t = {level.t}); "
                "use a grid that starts at a level with signal, or a v-prediction model."
            )
        return Prediction(Lin.of(x), Lin.of(out), kind, level)

    @staticmethod
    def from_x0(x: Values, out: Values, level: Level, eps: Values | None = None) -> Prediction:
        """From an estimate of x0; `eps` sets the direction apart from it."""
        direction = None if eps is None else Lin.of(eps)
        return replace(Prediction.of("x0", x, out, level), direction=direction)

    @staticmethod
    def from_eps(x: Values, out: Values, level: Level) -> Prediction:
        """From an estimate of the noise; ValueError at alpha = 0."""
        return Prediction.of("eps", x, out, level)

    @staticmethod
    def from_v(x: Values, out: Values, level: Level) -> Prediction:
        """From an estimate of v = alpha·eps − sigma·x0."""
        return Prediction.of("v", x, out, level)

    @staticmethod
    def from_velocity(x: Values, out: Values, level: Level) -> Prediction:
        """From an estimate of velocity = eps − x0."""
        return Prediction.of("velocity", x, out, level)

    def like(self, out: Values) -> Prediction:
        """The prediction at the same x, level and parametrisation with another output.

        For rules whose weights sum to one: they may combine `.out` directly, since every
        parametrisation is affine in every other at fixed (x, level).
        """
        return Prediction(self.x, Lin.of(out), self.kind, self.level)

    @property
    def x0(self) -> Lin:
        """The estimate of the clean sample; the same node at every access, computed once."""
        x0 = self.__dict__.get("_x0")
        if x0 is None:
            x0 = self.__dict__["_x0"] = self._clean()
        return x0

    def _clean(self) -> Lin:
        a, s = self.level.alpha, self.level.sigma
        if self.kind == "x0":
            return self.out
        if self.kind == "eps":
            return (self.x - s * self.out) / a
        if self.kind == "v":
            return _over(a * self.x - s * self.out, a * a + s * s)
        return _over(self.x - s * self.out, a + s)

    @property
    def eps(self) -> Lin:
        """The estimate of the noise; ValueError at sigma = 0 for an x0-prediction."""
        a, s = self.level.alpha, self.level.sigma
        if self.direction is not None:
            return self.direction
        if self.kind == "eps":
            return self.out
        if self.kind == "x0":
            if isinstance(s, float) and s == 0.0:
                raise ValueError("At sigma = 0 an x0-prediction has no eps: x holds no noise.")
            if isinstance(s, float):
                return (self.x - a * self.out) / s
            # Samples that are finished have no noise left: 0, where the formula divides 0 by 0.
            return (self.x - a * self.out) * ((s != 0) / s.where(s != 0, s + 1))
        if self.kind == "v":
            return _over(a * self.out + s * self.x, a * a + s * s)
        return _over(self.x + a * self.out, a + s)

    @property
    def v(self) -> Lin:
        """alpha·eps − sigma·x0."""
        if self.kind == "v" and self.direction is None:
            return self.out
        return self.level.alpha * self.eps - self.level.sigma * self.x0

    @property
    def velocity(self) -> Lin:
        """eps − x0."""
        if self.kind == "velocity" and self.direction is None:
            return self.out
        return self.eps - self.x0


def _over(lin: Lin, norm: Scalar) -> Lin:
    """lin / norm, where norm is 1 up to rounding for the levels that the kind belongs to."""
    if isinstance(norm, float) and abs(norm - 1) < 1e-6:
        return lin
    return lin / norm
