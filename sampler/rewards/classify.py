"""The log-probability of a class under an image classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from sampler.core.errors import UsageError
from sampler.registry import register
from sampler.rewards.base import Dtype, RewardBase

if TYPE_CHECKING:
    from torch import Tensor

BUNDLED = "bundled"


@register("reward", "classifier")
@dataclass(frozen=True)
class ClassifierLogProbability(RewardBase):
    """log p(label | image) of an image classifier: unlike p, its gradient does not vanish.

        score = log softmax(logits(image))[label]

    path: "bundled", the small classifier of the bundled model; or any image classifier in the
        transformers layout (a hub id with download).
    label: a class name; None is the class named in the prompt (the longest match). Raises
        ValueError for a prompt without one.
    head: output of the bundled classifier: "concept", "style" or "background".
    dtype: of a transformers classifier; scores are float32.
    download: fetch files that are not in the local cache from the Hub.
    """

    path: str = BUNDLED
    label: str | None = None
    head: Literal["concept", "style", "background"] = "concept"
    dtype: Dtype = "float32"
    download: bool = False

    @property
    def reads_prompt(self) -> bool:
        return self.label is None

    @cached_property
    def _network(self) -> Any:
        if self.path == BUNDLED:
            from sampler.bundled.classifier import load

            return load()
        from sampler.rewards.encoders import Vision

        return Vision("AutoModelForImageClassification", self.path, self.dtype, self.download)

    @cached_property
    def _labels(self) -> dict[str, int]:
        if self.path == BUNDLED:
            from sampler import bundled

            names = getattr(bundled, f"{self.head}s")()
            return {name: i for i, name in enumerate(names)}
        return self._network.labels

    def check(self) -> None:
        if self.label is not None and self.label not in self._labels:
            from sampler.registry import suggestion

            raise UsageError(
                f"The classifier has no class {self.label!r}{suggestion(self.label, self._labels)}."
            )
        _ = self._network

    def of_texts(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        import torch

        self.check()
        network = self._network.to(images.device)
        if self.path == BUNDLED:
            logits = getattr(network(images.float()), self.head)
        else:
            logits = network.logits(images)
        scores, found = logits.log_softmax(1), []
        for prompts in texts:
            wanted = [self._labels[self.label or named_label(p, self._labels)] for p in prompts]
            index = torch.tensor(wanted, device=images.device)
            found.append(scores.gather(1, index[:, None])[:, 0])
        return found

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.of_texts(images, [prompts])[0]


def named_label(prompt: str, labels: Sequence[str] | dict[str, int]) -> str:
    """Return the longest label in the prompt, as complete words. Raises ValueError for none."""
    text = prompt.lower()
    for label in sorted(labels, key=len, reverse=True):
        if re.search(rf"(?<!\w){re.escape(label.lower())}(?!\w)", text):
            return label
    raise ValueError(
        f"The prompt {prompt!r:.80} names no class of the classifier; give label, or prompts such "
        f"as {next(iter(labels))!r}."
    )
