"""Gradient-free classifier guidance: away from the most likely wrong class."""

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
"""Of w − 1: below it the reference class is not evaluated."""


class GFCGState(NamedTuple):
    """target: class of each sample [B].

    reference: most likely wrong class, int64 [B] on the CPU; gain: w − 1, float32 [B]. Both are
        None
    before the first classification.
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

    per sample. r and w come from the x̂0 of the step before, so that both branches share one batch
    and the first step is unguided. Two evaluations per step; one where w − 1 < 0.001. The
    classifier runs without gradients. With CFG on top: the rule `sum`.

    classifier: x̂0 [B, ...] -> logits [B, K]; then `cond.extra` must have "target" (class of
        each sample, int [B]) and "classes" (a tree of K conditions [K, ...], or a function of
        classes [B] to conditions [B, ...]). Or a reader of classes (`sampler.pipelines.classes`),
        which provides all three. None: the pipeline's own reader, which the bundled model has.
    strength: s.
    confidence: how w follows the classifier.
    network: "main", or "weak": D_r is the weak network's, Autoguidance without a further
        evaluation.
    interval: (low, high] in sigma/alpha; classifiers are unreliable on the blurred x̂0 of high
        noise. 5 is our choice.
    window: as for `cfg`.
    """

    classifier: Any = None
    strength: Strength = 2.0
    confidence: Literal["confusion", "ratio", "constant"] = "confusion"
    network: Literal["main", "weak"] = "main"
    interval: Interval | None = (0.0, 5.0)
    window: Window | None = None

    reference: ClassVar[str] = (
        "Gradient-Free Classifier Guidance for Diffusion Model Sampling (Shenoy et al., 2024), "
        "arXiv:2411.15393; reconstructed from the abstract (recon-v1)"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if self.network == "main" else {"cond", "weak"})

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[GFCG, Cond]:
        """Takes classifier, target and conditions of the classes from a reader of classes."""
        reader = context.adapter.classes if self.classifier is None else self.classifier
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
                f"gfcg: Cond.extra lacks {' and '.join(sorted(missing))}; give "
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
        if not self.strength or not _may_guide_next(self.interval, self.window, span):
            return guided, state
        import torch

        with torch.no_grad():
            logits = self.classifier(cond.x0.tensor().detach())
        return guided, self.judge(logits, state.target)

    def judge(self, logits: Tensor, target: Tensor) -> GFCGState:
        """Reference class and w − 1 of each sample, from logits [B, K] and target classes [B]."""
        import torch

        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"gfcg: the classifier must return logits [B, K], K >= 2 classes, not "
                f"{tuple(logits.shape)}."
            )
        wanted = target.to(logits.device)[:, None]
        p = logits.float().softmax(1)
        wrong = p.scatter(1, wanted, -1.0)
        # argmax may return any of several maxima: take the first
        best = wrong.amax(1, keepdim=True)
        reference = (wrong == best).int().argmax(1)
        p_y, p_r = p.gather(1, wanted)[:, 0], best[:, 0]
        gain = {
            "confusion": lambda: 1 - p_y,
            "ratio": lambda: 2 * p_r / (p_r + p_y),
            "constant": lambda: torch.ones_like(p_y),
        }[self.confidence]()
        return GFCGState(target, reference.cpu(), self.strength * gain)


def _may_guide_next(interval: Any, window: Any, span: Span) -> bool:
    """True where the rule may guide at the next step, which needs a classification now."""
    if span.next.sigma == 0:
        return False
    return active(interval, window, Span(span.index + 1, span.next, span.next))


def _conditions(classes: Any, reference: Tensor) -> Any:
    if callable(classes):
        return classes(reference)
    return map_tree(lambda leaf: leaf[reference.to(leaf.device)], classes)
