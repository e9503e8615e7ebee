"""The distance of the number of objects in an image from a target number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from sampler.core.errors import UsageError
from sampler.registry import register, suggestion
from sampler.rewards.base import Dtype, PixelReward

if TYPE_CHECKING:
    from torch import Tensor


@register("reward", "object_count")
@dataclass(frozen=True)
class ObjectCount(PixelReward):
    """−|n̂ − n|, n̂ the number of objects of a class found by a detector.

        soft: n̂ = Σ over queries of p(class)              differentiable
        hard: n̂ = number of queries with p(class) >= threshold

    p is a softmax for detectors with a class "no object" (DETR, YOLOS), else a sigmoid (RT-DETR,
    OWL-ViT, Grounding DINO). The prompt is not used.

    path: a detector in the transformers layout (a hub id with download).
    label: a class name; for vocabulary "open" any phrase.
    count: n, the target number of objects.
    counting: "soft", or "hard", which has no gradient.
    vocabulary: "fixed" classes, or "open" (OWL-ViT, OWLv2, Grounding DINO).
    threshold: of the hard count; 0.5 by convention of the detectors' own
        post-processing.
    dtype: of the detector; scores are float32.
    download: fetch files that are not in the local cache from the Hub.
    """

    path: str
    label: str
    count: Annotated[int, Ge(0)]
    counting: Literal["soft", "hard"] = "soft"
    vocabulary: Literal["fixed", "open"] = "fixed"
    threshold: Annotated[float, Gt(0), Lt(1)] = 0.5
    dtype: Dtype = "float32"
    download: bool = False

    @property
    def differentiable(self) -> bool:
        return self.counting == "soft"

    @cached_property
    def _detector(self) -> Any:
        from sampler.rewards.encoders import Vision

        auto = "ObjectDetection" if self.vocabulary == "fixed" else "ZeroShotObjectDetection"
        detector = Vision(f"AutoModelFor{auto}", self.path, self.dtype, self.download)
        if self.vocabulary == "fixed" and self.label not in detector.labels:
            raise UsageError(
                f"The detector has no class {self.label!r}"
                f"{suggestion(self.label, detector.labels)}."
            )
        return detector

    def check(self) -> None:
        _ = self._detector

    def probabilities(self, images: Tensor) -> Tensor:
        """Return p(class) of every query [B, queries]."""
        detector = self._detector.to(images.device)
        if self.vocabulary == "open":
            return detector.phrase_logits(images, self.label).sigmoid()
        logits, labels = detector.logits(images), detector.labels
        has_no_object = logits.shape[-1] == len(labels) + 1
        p = logits.softmax(-1) if has_no_object else logits.sigmoid()
        return p[..., labels[self.label]]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        p = self.probabilities(images)
        found = p.sum(1) if self.counting == "soft" else (p >= self.threshold).float().sum(1)
        return -(found - self.count).abs()
