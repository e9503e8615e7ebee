"""Condition-annealed sampling: noise on the conditions early in a run, for diversity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Ge, Le

from sampler.core.binding import GuidanceContext
from sampler.core.regime import inner_rules, regime
from sampler.registry import build, register
from sampler.registry.constraints import Fraction, Nonnegative
from sampler.types import Branch, Cond, GuidanceBase, Prediction, Span

if TYPE_CHECKING:
    from torch import Tensor

STATES = "encoder_hidden_states"
POOLED = ("pooled_projections", "text_embeds")
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")


@register("guidance", "cads")
@dataclass(frozen=True)
class CADS(GuidanceBase):
    """Condition-annealed sampling: any rule, on conditions with noise that fades.

        γ = 1 (t <= τ1), 0 (t >= τ2), (τ2 − t)/(τ2 − τ1) between;   t = 1 − step/steps
        v = sqrt(γ)·y + s·sqrt(1 − γ)·n,   n ~ N(0, I)
        ŷ = ψ·((v − mean v)/std v·std y + mean y) + (1 − ψ)·v

    on the text states y, with mean and std (unbiased) per sample over its tokens and channels. The
    noise of a sample depends on its seed and the step alone. Where γ = 1 the conditions are those
    of the rule, the same tensors. No further evaluations.

    t starts at 1: at γ = 0 and ψ = 1 the rescaling cancels s, and the prompt is gone. Of 4 steps,
    step 0 has γ = 0 and step 1 γ = 0.5, so for few steps τ2 is the setting that matters, or
    form = "uniform": y + strength·std(y)·n on a share of the values, n uniform in −1..1, in the
    first part of the run (InvokeAI's and ComfyUI's seed variance enhancer).

    rule: the rule inside; it must have text conditions.
    noise_scale: s >= 0. 0.25 is the published setting.
    tau1, tau2: in 0..1, tau1 < tau2.
    rescale: ψ in 0..1; 1 brings mean and std back.
    branches: the branches whose conditions get noise; ("cond", "uncond") as in the A1111 port.
    pooled: whether pooled text vectors get noise too.
    form: "cads" or "uniform".
    strength, share, until: of "uniform": the amplitude in std, the share of the values, and the
        part of the run.
    """

    rule: Any = field(default="cfg", metadata={"kind": "guidance"})
    noise_scale: Nonnegative = 0.25
    tau1: Fraction = 0.6
    tau2: Annotated[float, Ge(0), Le(1)] = 0.9
    rescale: Fraction = 1.0
    branches: tuple[str, ...] = ("cond",)
    pooled: bool = False
    form: Literal["cads", "uniform"] = "cads"
    strength: Nonnegative = 0.1
    share: Fraction = 0.5
    until: Fraction = 0.2

    reference: ClassVar[str] = (
        "CADS: Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling "
        "(Sadat et al., 2023), arXiv:2310.17347, algorithm 1"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", build("guidance", self.rule))
        object.__setattr__(self, "branches", tuple(self.branches))
        if self.tau1 >= self.tau2:
            raise ValueError(f"cads: tau1 = {self.tau1} must be less than tau2 = {self.tau2}.")
        if "forecast" in inner_rules(self.rule):
            raise ValueError("cads: put forecast outside: forecast(rule=cads(...)).")

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    @property
    def sets_direction(self) -> bool:
        """Return True if the inner rule keeps a direction apart from its target."""
        return self.rule.sets_direction

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[CADS, Cond]:
        """The rule inside bound to the run; see `sampler.core.binding`."""
        if context.adapter.takes_classes:
            raise ValueError("cads: this model is conditioned on classes, not on text.")
        rule, cond = self.rule.bind(context, cond)
        return (self if rule is self.rule else replace(self, rule=rule)), cond

    def start(self, cond: Cond) -> Any:
        if isinstance(cond.cond, str) or not _has_states(cond.cond):
            raise ValueError(
                "cads: there are no text states to add noise to. In stock pipelines the prompt is "
                "encoded already; use sampler.load(pipe).generate(...)."
            )
        return self.rule.start(cond)

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        branches = dict(self.rule.plan(x, span, cond, state))
        if not span.total:
            raise ValueError("cads: its schedule needs a run of a known number of steps.")
        if self._clean(span):
            return branches
        for name in branches.keys() & set(self.branches):
            altered = self._altered(branches[name].cond, span, cond.extra["seeds"])
            branches[name] = replace(branches[name], cond=altered)
        return branches

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        return self.rule.combine(x, preds, span, state)

    def regime(self, x: Any, span: Span, state: Any) -> dict[str, Any]:
        """The branches of the rule inside; see `sampler.core.regime.regime`."""
        return regime(self.rule, x, span, state)

    def _clean(self, span: Span) -> bool:
        if self.form == "uniform":
            return not self.strength or span.index >= self.until * span.total
        return gamma(1 - span.index / span.total, self.tau1, self.tau2) == 1

    def _altered(self, cond: Any, span: Span, seeds: Tensor) -> Any:
        if not isinstance(cond, Mapping):
            return self._noised(cond, None, span, seeds, 0)
        given = cast("Mapping[str, Any]", cond)
        mask = next((given[name] for name in MASKS if given.get(name) is not None), None)
        found = {**given, STATES: self._noised(given[STATES], mask, span, seeds, 0)}
        for name in POOLED if self.pooled else ():
            if name in given:
                found[name] = self._noised(given[name], None, span, seeds, 1)
        return found

    def _noised(self, y: Tensor, mask: Any, span: Span, seeds: Tensor, part: int) -> Tensor:
        """The states y [B, ..., C] with noise; part: a number for each tensor of a condition."""
        import torch

        from sampler.core.noise import Noise

        rows: list[int] = cast(Any, seeds).tolist()
        noise = Noise(tuple(rows)).draw(2 * span.index + part, y.float(), "cads")
        if self.form == "cads":
            level = gamma(1 - span.index / span.total, self.tau1, self.tau2)
            return annealed(y, noise, level, self.noise_scale, self.rescale, mask)
        # Φ(n) is uniform; where it lies in the share it is spread over −1..1.
        chance: Tensor = cast(Any, torch.special).ndtr(noise)
        spread = (2 * chance / self.share - 1) if self.share else chance
        std = _statistics(y.float(), mask)[1]
        chosen = (chance < self.share) & _valid(y, mask)
        return torch.where(chosen, y.float() + self.strength * std * spread, y.float()).to(y.dtype)


def gamma(t: float, tau1: float = 0.6, tau2: float = 0.9) -> float:
    """The share of the clean condition at progress t: 1 up to tau1, 0 from tau2 on."""
    if t <= tau1:
        return 1.0
    return 0.0 if t >= tau2 else (tau2 - t) / (tau2 - tau1)


def annealed(
    y: Tensor, noise: Tensor, gamma: float, scale: float, rescale: float, mask: Any = None
) -> Tensor:
    """ŷ [B, ...] from states y and noise n ~ N(0, I) of the same shape; y itself at gamma = 1.

    mask [B, T]: the valid tokens of y [B, T, C]; others are left as they are. A sample of constant
    v keeps v.
    """
    import torch

    if gamma == 1:
        return y
    wide = y if y.dtype is torch.float64 else y.float()
    v = gamma**0.5 * wide + scale * (1 - gamma) ** 0.5 * noise
    (mean, std), (new_mean, new_std) = _statistics(wide, mask), _statistics(v, mask)
    flat = ~(new_std > 0)
    back = (v - new_mean) / torch.where(flat, torch.ones_like(new_std), new_std) * std + mean
    found = torch.where(flat, v, rescale * back + (1 - rescale) * v)
    return torch.where(_valid(y, mask), found, wide).to(y.dtype)


def _statistics(y: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std of each sample over its valid tokens and channels, [B, 1, ...]."""
    valid = _valid(y, mask).expand_as(y)
    dims = tuple(range(1, y.ndim))
    count = valid.sum(dims, keepdim=True)
    mean = (y * valid).sum(dims, keepdim=True) / count
    square = ((y - mean).square() * valid).sum(dims, keepdim=True) / (count - 1)
    return mean, square.sqrt()


def _valid(y: Tensor, mask: Any) -> Tensor:
    import torch

    if mask is None:
        return torch.ones_like(y, dtype=torch.bool)
    return mask.to(y.device).bool().view(*mask.shape, *(1,) * (y.ndim - mask.ndim))


def _has_states(cond: Any) -> bool:
    import torch

    states = cast("Mapping[str, Any]", cond).get(STATES) if isinstance(cond, Mapping) else cond
    return isinstance(states, torch.Tensor) and states.ndim > 1 and states.is_floating_point()
