"""Classifier guidance: along the gradient of a classifier's log-probability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sampler.core.adapter import ClassReader
from sampler.core.binding import GuidanceContext
from sampler.guidance.gates import Interval, Strength, Window, active
from sampler.registry import register
from sampler.types import Cond, GuidanceBase, Lin, Prediction, Span

if TYPE_CHECKING:
    from torch import Tensor


@register("guidance", "classifier")
@dataclass(frozen=True)
class ClassifierGuidance(GuidanceBase):
    """Classifier guidance: the conditional prediction, moved up the classifier's log-probability.

        at="x":   eps' = eps − s·sigma·∇_x log p(y|x)          a classifier of noised images
        at="x0":  x0' = x0 + s·sigma²/(alpha² + sigma²)·∇_x0 log p(y|x0)   of clean images

    per row, the gradients in the latents' precision. One network row per step, plus the classifier
    with its gradient. The gradient is a constant to autograd.

    classifier: for at="x" (x [B, ...], level) -> logits [B, K], for at="x0" x0 [B, ...] -> logits;
        then `cond.extra` must have "target" (class of each row, int [B]). Or a reader of classes
        (`sampler.pipelines.classes`), for at="x0". None: the pipeline's own reader.
    strength: s >= 0; 0 is no guidance, 1 is Bayes' rule.
    at: where the classifier looks.
    interval, window: as for `cfg`.

    Deviations: at="x0" does not differentiate through the network; the Jacobian of the posterior
    mean is taken as alpha/(alpha² + sigma²), that of unit-variance data. At alpha = 0, where x
    holds no signal, at="x" does nothing.
    """

    classifier: Any = None
    strength: Strength = 1.0
    at: Literal["x", "x0"] = "x0"
    interval: Interval | None = None
    window: Window | None = None

    reference: ClassVar[str] = (
        "Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021), "
        "arXiv:2105.05233, algorithm 2"
    )

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[ClassifierGuidance, Cond]:
        """The classifier and the wanted classes, from a reader of classes."""
        reader: Any = self.classifier
        if reader is None:
            reader = context.adapter.classes
        if not isinstance(reader, ClassReader):
            return self, cond
        extra = {**cond.extra, "target": reader.target(context.prompts)}
        return replace(self, classifier=reader.classify), replace(cond, extra=extra)

    def start(self, cond: Cond) -> Tensor:
        if not callable(self.classifier):
            raise ValueError(
                "classifier: a classifier is needed: give classifier=..., a function to logits."
            )
        if "target" not in cond.extra:
            raise ValueError(
                "classifier: the wanted classes are missing; give Cond(extra={'target': ...})."
            )
        return cond.extra["target"]

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Tensor
    ) -> tuple[Prediction, Tensor]:
        cond, level = preds["cond"], span.now
        off = not self.strength or not active(self.interval, self.window, span)
        if off or (self.at == "x" and level.alpha == 0):
            return cond, state
        a, s = level.alpha, level.sigma
        if self.at == "x":
            gradient = self._gradient(x.detach(), (level,), state)
            gain = self.strength * s * s / a
        else:
            gradient = self._gradient(cond.x0.tensor().detach(), (), state)
            gain = self.strength * s * s / (a * a + s * s)
        return Prediction.from_x0(x, cond.x0 + gain * Lin.of(gradient), level), state

    def _gradient(self, at: Tensor, further: tuple[Any, ...], target: Tensor) -> Tensor:
        """∇ Σ_b log p(y_b | at_b): a sum over rows, so that a row's gradient is its own."""
        import torch

        with torch.enable_grad():
            leaf = at.clone().requires_grad_()
            logits = self.classifier(leaf, *further)
            wanted = target.to(logits.device)[:, None]
            score = logits.log_softmax(1).gather(1, wanted).sum()
            return torch.autograd.grad(score, leaf)[0]
