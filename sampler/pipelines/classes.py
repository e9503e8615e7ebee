"""Readers of classes for the rules `gfcg` and `classifier`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sampler.core.adapter import ClassReader, PipelineAdapter, Size
from sampler.core.loop import Loop

Images = Callable[[Tensor], Tensor]


class CandidateClasses(ClassReader):
    """Classes given as prompts; `classifier`: images [B, 3, H, W] in [0, 1] -> logits [B, K].

    Raises ValueError for fewer than two candidates.
    """

    def __init__(
        self, adapter: PipelineAdapter, candidates: Sequence[str], classifier: Images
    ) -> None:
        if len(candidates) < 2:
            raise ValueError("Classes need at least two candidate prompts, one of them wrong.")
        self.adapter = adapter
        self.candidates = list(candidates)
        self.classifier = classifier

    def target(self, prompts: Sequence[str]) -> Tensor:
        """Raise ValueError for a prompt that is not a candidate."""
        if unknown := [p for p in prompts if p not in self.candidates]:
            raise ValueError(f"The prompt {unknown[0]!r:.60} is not one of the candidate prompts.")
        return torch.tensor([self.candidates.index(prompt) for prompt in prompts])

    def conditions(self, prompts: Sequence[str], size: Size) -> Callable[[Tensor], Any]:
        return lambda classes: _encoded(self.adapter, [self.candidates[k] for k in classes], size)

    def classify(self, x0: Tensor) -> Tensor:
        return self.classifier(self.adapter.decode(x0))


class BundledClasses(ClassReader):
    """Concepts of the bundled model: "a red apple on blue" against the same with another one."""

    def __init__(self, adapter: PipelineAdapter) -> None:
        from sampler.bundled import concepts

        self.adapter = adapter
        self.concepts = concepts()
        # longest name first: "hot dog" before "dog"
        names = sorted(map(re.escape, self.concepts), key=len, reverse=True)
        self.pattern = re.compile(rf"\b({'|'.join(names)})\b", re.IGNORECASE)

    @cached_property
    def classifier(self) -> Any:
        from sampler.bundled import classifier

        return classifier.load().to(self.adapter.device)

    def target(self, prompts: Sequence[str]) -> Tensor:
        """Raise ValueError for a prompt that names none of the 128 concepts."""
        found = [self.pattern.search(prompt) for prompt in prompts]
        if None in found:
            raise ValueError(
                f"The prompt {prompts[found.index(None)]!r:.60} names no concept of the bundled "
                "classifier; see sampler.bundled.concepts()."
            )
        names = [match[1].lower() for match in found if match]
        return torch.tensor([self.concepts.index(name) for name in names])

    def conditions(self, prompts: Sequence[str], size: Size) -> Callable[[Tensor], Any]:
        def encoded(classes: Tensor) -> Any:
            names = [self.concepts[k] for k in classes]
            texts = [
                self.pattern.sub(lambda _, name=name: name, prompt, count=1)
                for prompt, name in zip(prompts, names, strict=True)
            ]
            return _encoded(self.adapter, texts, size)

        return encoded

    def classify(self, x0: Tensor) -> Tensor:
        return self.classifier(self.adapter.decode(x0)).concept


def gfcg_for(engine: Loop, candidates: Sequence[str], classifier: Images, **fields: Any) -> Any:
    """Build the rule `gfcg` for an engine with candidate prompts as its classes.

    classifier: images [B, 3, H, W] in [0, 1] -> logits [B, K] in the order of the candidates, such
    as `clip_classifier` or `image_classifier`. fields: further fields of the rule.
    """
    from sampler import registry

    reader = CandidateClasses(engine.pipeline, candidates, classifier)
    return registry.build("guidance", {"name": "gfcg", "classifier": reader, **fields})


def clip_classifier(folder: str, candidates: Sequence[str]) -> Images:
    """CLIP similarity of an image to each of K texts: exp(logit_scale)·e·c, [B, K].

    folder: a CLIP model in the transformers layout. Raises ModelError for any other folder.
    """
    from sampler.rewards.encoders import Clip

    clip = Clip(folder, "float32", False)
    texts = clip.text(candidates)

    def logits(images: Tensor) -> Tensor:
        seen = clip.to(images.device).image(images)
        return clip.temperature * seen @ texts.to(images.device).T

    return logits


def image_classifier(folder: str, labels: Sequence[str] | None = None) -> Images:
    """Logits [B, K] of an image classifier from a local folder; `labels`: those to use.

    folder: in the transformers layout. Raises ModelError for any other folder, and ValueError for a
    label that the model does not have.
    """
    from sampler.rewards.encoders import Vision

    network = Vision("AutoModelForImageClassification", folder, "float32", False)
    known = network.labels
    if unknown := [label for label in labels or () if label not in known]:
        raise ValueError(f"{folder} has no label {unknown[0]!r}; it has {len(known)} others.")
    index = None if labels is None else torch.tensor([known[label] for label in labels])

    def logits(images: Tensor) -> Tensor:
        found = network.to(images.device).logits(images)
        return found if index is None else found[:, index.to(images.device)]

    return logits


def _encoded(adapter: PipelineAdapter, prompts: list[str], size: Size) -> Any:
    with torch.no_grad():
        return adapter.encode(prompts, [""] * len(prompts), False, size).cond
