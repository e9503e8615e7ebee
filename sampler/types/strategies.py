"""Base classes of samplers and guidance rules, and the protocol of a denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sampler_kernels import Lin

from sampler.types.prediction import Prediction
from sampler.types.values import Branch, Cond, Level, Move, Span

if TYPE_CHECKING:
    from torch import Tensor


class Denoiser(Protocol):
    """A model that predicts x0 for several branches in one batched evaluation.

    x [B, ...]; the answer has a Prediction for every branch. Adds to `nfe`, a list of B ints,
    each row that is evaluated.
    """

    def __call__(
        self, x: Tensor, span: Span, branches: Mapping[str, Branch], nfe: list[int]
    ) -> Mapping[str, Prediction]: ...


class SamplerBase:
    """Base of the samplers: a method that moves one level down, given one prediction.

    It never calls the model. A strategy is a frozen dataclass that overrides what differs.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    # Whether a prediction's direction enters as x' = alpha'·x0 + sigma'·direction at the first
    # step; rules that keep one apart from the target refuse other samplers.
    follows_direction: ClassVar[bool] = False
    # Streams of `sampler.core.noise` that a step draws from, besides the noise of its move.
    draws: ClassVar[tuple[str, ...]] = ()

    @property
    def convergence(self) -> float | None:
        """Order of convergence to the exact ODE on equal steps in u (tested); None without one."""
        return 1.0

    @property
    def evaluations(self) -> int:
        """Evaluations per step, each of which is a step of the grid that `levels` returns."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Return whether moves may have std > 0."""
        return False

    def bind(self, context: Any) -> Any:
        """The sampler completed for a run of `generate` (a calibrated number, a decoder).

        context: `sampler.core.binding.SamplerContext`. Raises ValueError for a run that the sampler
        cannot do, before the network is called.
        """
        return self

    def with_schedule(self, schedule: Any) -> Any:
        """The sampler with the times of levels between those of the grid, from a `Schedule`."""
        return self

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid to walk, from the requested grid; noisy first."""
        return grid

    def start(self, x: Tensor, level: Level) -> tuple[Any, Any]:
        """(x, first state) from the first noise x [B, ...]."""
        return x, ()

    def finish(self, x: Tensor, state: Any) -> Any:
        """The result [B, ...] from the last x and state."""
        return x

    def error_term(self, pred: Prediction, move: Move, span: Span, state: Any) -> Lin | None:
        """The term T [B, ...] of a move that was made with `state`, for `Result.solver_error`.

        None where the step has none.
        """
        return None

    def error_weights(self, spans: Sequence[Span]) -> tuple[float, ...]:
        """Weights w of the terms in the local error of the last step, from all steps up to it.

            x'_{p+1} − x'_p = w_0·T_0 + sum_{j >= 1} w_j·(T_j − T_0)

        T_j is the term of the step j before it. Without weights the step has no estimate.
        """
        return ()

    def step(self, x: Tensor, pred: Prediction, span: Span, state: Any) -> Move:
        """The move from `span.now` to `span.next`."""
        raise NotImplementedError


class GuidanceBase:
    """Base of the rules: names the branches to evaluate, and combines them into one prediction.

    A strategy is a frozen dataclass that overrides what differs.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""

    @property
    def needs(self) -> frozenset[str]:
        """Names that must be there: "cond", "uncond", and those of further models ("weak")."""
        return frozenset({"cond"})

    @property
    def sets_direction(self) -> bool:
        """Return True if predictions have a direction apart from their target."""
        return False

    @property
    def graph_refusal(self) -> str:
        """Reason that runs cannot be CUDA graphs; "" where they can."""
        return ""

    def check(self, adapter: Any) -> None:
        """Raise ValueError for a `PipelineAdapter` that the rule cannot run on."""

    def bind(self, context: Any, cond: Cond) -> tuple[Any, Cond]:
        """(rule, conditions) completed for a run of `generate`: a classifier, further conditions.

        context: `sampler.core.binding.GuidanceContext`. Raises ValueError for a run that the rule
        cannot do, before the network is called. A rule with rules inside binds them too.
        """
        return self, cond

    def start(self, cond: Cond) -> Any:
        """The first state of a run over these conditions."""
        return ()

    def plan(self, x: Tensor, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        """The evaluations of this step, in the order in which they are stacked."""
        return {"cond": Branch(cond.cond)}

    def combine(
        self, x: Tensor, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        """(guided prediction, next state)."""
        return preds["cond"], state


# Names for annotations.
Sampler = SamplerBase
Guidance = GuidanceBase
