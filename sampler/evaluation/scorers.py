"""Scorers of single images: rewards, the judge, and statistics of pixels."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sampler import registry
from sampler.bundled import backgrounds, concepts
from sampler.bundled.classifier import Logits
from sampler.bundled.judge import load
from sampler.core.errors import UsageError
from sampler.rewards.base import FunctionReward, RewardBase, as_reward
from sampler.rewards.classify import named_label
from sampler.rewards.scoring import score_parts
from sampler.rewards.simple import named_colour
from sampler.runs.jobs import canonical

_CLIPPED = 0.005  # of 0 or 1, which is beyond 0.99 in [-1, 1]


class ImageScorer:
    """A function of one image and its prompt, to one or more named columns.

    label: of the first column; reads_prompt: images without a prompt are refused; kept: scores are
    read from a cache by `fingerprint`.
    """

    label: str
    reads_prompt: bool = False
    kept: bool = True

    def check(self) -> None:
        """Load what the scorer needs. Raises SamplerError (6) for missing files."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines a score: definition, settings and weights."""
        return digest_of(self.label)

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Compute the scores [B] by column of images [B, 3, H, W] in [0, 1]."""
        raise NotImplementedError

    def weights(self, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return by column the weights of prompts in its mean; all are 1 where it is left out."""
        return {}


@dataclass
class RewardScorer(ImageScorer):
    """A reward; the parts of a composite one are columns of their own.

    The scores of functions are not kept: they may depend on values that no source shows.
    """

    reward: RewardBase
    label: str

    def __post_init__(self) -> None:
        if self.reward.batched:
            raise UsageError(
                f"{self.label!r} judges whole batches of a training; give a reward of single "
                "images."
            )

    @property
    def reads_prompt(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.reward.reads_prompt

    @property
    def kept(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not _has_code(registry.spec_of(self.reward))

    def check(self) -> None:
        self.reward.check()

    @cached_property
    def fingerprint(self) -> str:
        self.check()
        return digest_of(_described(self.reward), *_modules(self.reward))

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = score_parts(self.reward, images, prompts)
        parts = {f"{self.label}.{name}": value for name, value in found.parts.items()}
        return {self.label: found.total, **parts}


class JudgeScorer(ImageScorer):
    """The judge: log p of the named concept, and whether concept and background are the top class.

    A classifier of the bundled model's world that is used in no training
    (sampler/bundled/judge.py); it is not available as a reward, so that it stays independent of
    what is tuned.
    """

    label = "judge"
    reads_prompt = True

    @cached_property
    def _network(self) -> nn.Module:
        return load()

    @cached_property
    def fingerprint(self) -> str:
        return digest_of(self.label, self._network)

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        logits: Logits = self._network(images)
        concept, found = _index(concepts(), [named_label(p, concepts()) for p in prompts]), {}
        found["judge"] = logits.concept.log_softmax(1).gather(1, concept[:, None])[:, 0]
        found["judge.concept"] = (logits.concept.argmax(1) == concept).float()
        place = _index(backgrounds(), [named_colour(p) for p in prompts])
        found["judge.background"] = (logits.background.argmax(1) == place).float()
        return found


@dataclass
class Statistic(ImageScorer):
    """A function of the pixels alone, images [B, 3, H, W] in [0, 1] to [B]."""

    label: str
    function: Callable[[Tensor], Tensor]

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {self.label: self.function(images)}


def saturation(images: Tensor) -> Tensor:
    """Mean over pixels of largest − smallest channel, [B]."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def clipped(images: Tensor) -> Tensor:
    """Share of values within 0.005 of 0 or 1, [B]."""
    return ((images < _CLIPPED) | (images > 1 - _CLIPPED)).float().mean((1, 2, 3))


def sharpness(images: Tensor) -> Tensor:
    """Variance of the Laplacian of the luminance, [B]; grows with detail and with noise.

    NaN for images of fewer than two inner pixels.
    Source: Diatom autofocusing in brightfield microscopy (Pech-Pacheco et al., 2000).
    """
    height, width = images.shape[2:]
    if min(height, width) < 3 or (height - 2) * (width - 2) < 2:
        return images.new_full((len(images),), math.nan)
    weights = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    kernel = images.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d((images * weights).sum(1, keepdim=True), kernel).var((1, 2, 3))


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (saturation, clipped, sharpness)
}


def _index(names: Sequence[str], wanted: Sequence[str]) -> Tensor:
    return torch.tensor([names.index(name) for name in wanted])


def _described(reward: RewardBase) -> str:
    """Definition of a reward as text: its settings, or the source of its function."""
    spec = _plain(registry.spec_of(reward))
    return canonical(spec) if isinstance(spec, Mapping) else str(spec)


def _plain(value: Any) -> Any:
    """Settings with functions replaced by their sources."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if not callable(value):
        return value
    function = value.function if isinstance(value, FunctionReward) else value
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return f"{as_reward(value).name} {type(function).__qualname__}"


def _has_code(settings: Any) -> bool:
    """Return True for settings with a function or an object of one's own."""
    if isinstance(settings, Mapping):
        return any(map(_has_code, settings.values()))
    if isinstance(settings, (list, tuple)):
        return any(map(_has_code, settings))
    return callable(settings)


def _modules(value: Any, depth: int = 3) -> list[nn.Module]:
    """Networks inside a reward, in the order of their names."""
    if isinstance(value, nn.Module):
        return [value]
    if depth == 0:
        return []
    inner = value if isinstance(value, (list, tuple)) else ()
    inner = inner or [v for _, v in sorted(getattr(value, "__dict__", {}).items())]
    return [module for one in inner for module in _modules(one, depth - 1)]


def digest_of(text: str, *networks: nn.Module) -> str:
    """Fingerprint of a description and of the tensors of networks, 20 hex digits."""
    digest = hashlib.sha256(text.encode())
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()[:20]
