"""Gradient-free classifier guidance: extrapolation away from the most likely wrong class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from sampler_kernels import map_tree

from sampler.core.adapter import ClassReader
from sampler.core.binding import GuidanceContext
from sampler.guidance.gates import Interval, Strength, Window, active
from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Prediction, Span

if TYPE_CHECKING:
    from torch import Tensor

NEGLIGIBLE = 1e-3
"""Of w − 1: below it the reference pass is left out (guidance.md 9)."""


class GFCGState(NamedTuple):
    """target: class of each row, [B]; reference, gain: of the classifier, None before it runs.

    reference: int64 [B] on the CPU, the most likely wrong class; gain: w − 1 per row, float32 [B].
    """

    target: Any
    reference: Any = None
    gain: Any = None


@register("guidance", "gfcg")
@dataclass(frozen=True)
class GFCG(GuidanceBase):
    """Gradient-free classifier guidance; a reconstruction, not verified against the paper's text.

        p = softmax(classifier(x̂0 of D_y)),   r = argmax_{k != y} p_k   (ties: the lowest index)
        w = 1 + s·(1 − p_y)                   confidence = "confusion"
            1 + s·2·p_r/(p_r + p_y)           "ratio"
            1 + s                             "constant"
        g = D_y + w_eff·(D_y − D_r),          w_eff = w − 1

    per row. r and w come from the x̂0 of the step before, so that both passes share one evaluation
    and the first step is unguided. One row for y and one for r per step; none for r where
    w − 1 < 0.001. The classifier runs without gradients. With CFG on top: the rule `sum`.

    classifier: x̂0 [B, ...] -> logits [B, K]; then `cond.extra` must have "target" (class of each
        row, int [B]) and "classes" (a tree of K conditions [K, ...], or a function of classes [B]
        to conditions [B, ...]). Or a reader of classes (`sampler.pipelines.classes`), which brings
        all three. None: the pipeline's own reader, which the bundled model has.
    strength: s >= 0.
    confidence: how w follows the classifier.
    network: "main", or "weak": D_r is the weak network's, Autoguidance at no further pass.
    interval: (low, high] in sigma/alpha; a classifier knows little of the blurred x̂0 at high
        noise. 5 is our choice.
    window: as for `cfg`.
    variant: which reconstruction; there is one.
    """

    classifier: Any = None
    strength: Strength = 2.0
    confidence: Literal["confusion", "ratio", "constant"] = "confusion"
    network: Literal["main", "weak"] = "main"
    interval: Interval | None = (0.0, 5.0)
    window: Window | None = None
    variant: Literal["recon-v1"] = "recon-v1"

    reference: ClassVar[str] = (
        "Gradient-Free Classifier Guidance for Diffusion Model Sampling (Shenoy et al., 2024), "
        "arXiv:2411.15393; reconstructed from the abstract (recon-v1)"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if self.network == "main" else {"cond", "weak"})

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[GFCG, Cond]:
        """The classifier and the conditions of its classes, from a reader of classes."""
        reader: Any = self.classifier
        if reader is None:
            reader = context.adapter.classes
        if not isinstance(reader, ClassReader):
            return self, cond
        extra = {
            **cond.extra,
            "target": reader.target(context.prompts),
            "classes": reader.conditions(context.prompts, context.size),
        }
        return replace(self, classifier=reader.classify), replace(cond, extra=extra)

    def start(self, cond: Cond) -> GFCGState:
        if not callable(self.classifier):
            raise ValueError(
                "gfcg: a classifier is needed: give classifier=..., a function of x0 to logits, or "
                "a reader of classes from sampler.pipelines.classes."
            )
        if missing := {"target", "classes"} - set(cond.extra):
            raise ValueError(
                f"gfcg: the conditions lack {' and '.join(sorted(missing))}; give "
                "Cond(extra={'target': ..., 'classes': ...})."
            )
        return GFCGState(cond.extra["target"])

    def plan(self, x: Any, span: Span, cond: Cond, state: GFCGState) -> Mapping[str, Branch]:
        branches = {"cond": Branch(cond.cond)}
        if state.reference is None or not active(self.interval, self.window, span):
            return branches
        rows = (state.gain >= NEGLIGIBLE).cpu()
        if not rows.any():
            return branches
        reference = _conditions(cond.extra["classes"], state.reference)
        return {**branches, "reference": Branch(reference, model=self.network, rows=rows)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: GFCGState
    ) -> tuple[Prediction, GFCGState]:
        cond = guided = preds["cond"]
        if "reference" in preds:
            away = cond.out - preds["reference"].out
            guided = cond.like(cond.out + away * state.gain)
        if not self.strength or not inside_later(self.interval, self.window, span):
            return guided, state
        import torch

        with torch.no_grad():
            logits = self.classifier(cond.x0.tensor().detach())
        return guided, self.judge(logits, state.target)

    def judge(self, logits: Tensor, target: Tensor) -> GFCGState:
        """Reference class and w − 1 of each row, from logits [B, K] and the wanted classes [B]."""
        import torch

        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"gfcg: the classifier must answer [B, K] with K >= 2 classes, not "
                f"{tuple(logits.shape)}."
            )
        wanted = target.to(logits.device)[:, None]
        p = logits.float().softmax(1)
        wrong = p.scatter(1, wanted, -1.0)
        # argmax may return any of several maxima; the first one is asked for
        best = wrong.amax(1, keepdim=True)
        reference = (wrong == best).int().argmax(1)
        p_y, p_r = p.gather(1, wanted)[:, 0], best[:, 0]
        gain = {
            "confusion": lambda: 1 - p_y,
            "ratio": lambda: 2 * p_r / (p_r + p_y),
            "constant": lambda: torch.ones_like(p_y),
        }[self.confidence]()
        return GFCGState(target, reference.cpu(), self.strength * gain)


def inside_later(interval: Any, window: Any, span: Span) -> bool:
    """Return whether the rule may guide at the next step; else nothing is classified."""
    if span.next.sigma == 0:
        return False
    return active(interval, window, Span(span.index + 1, span.next, span.next))


def _conditions(classes: Any, reference: Tensor) -> Any:
    if callable(classes):
        return classes(reference)

    def picked(leaf: Tensor) -> Tensor:
        return leaf[reference.to(leaf.device)]

    return map_tree(picked, classes)
