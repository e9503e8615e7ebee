"""Rewards based on CLIP: agreement of image and text, human preference, aesthetics.

e and c are the projected embeddings of the image and of the prompt, both divided by their norms.
Images are resized with antialiased bicubic interpolation, as CLIP's own preprocessing does, and
cropped to their central square but for HPSv2, which pads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sampler.core.errors import ModelError
from sampler.registry import register
from sampler.registry.constraints import Positive
from sampler.rewards.base import Dtype, RewardBase

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.rewards.encoders import Clip


class _ClipReward(RewardBase):
    """Base of the rewards on one CLIP model, which is loaded once."""

    path: str
    dtype: Dtype
    download: bool = False

    @cached_property
    def _clip(self) -> Clip:
        from sampler.rewards.encoders import Clip

        return Clip(self.path, self.dtype, self.download)

    def check(self) -> None:
        _ = self._clip

    def mapped(self, cosine: Tensor) -> Tensor:
        """Return the scores [B] of the cosines of images and prompts."""
        return cosine

    def of_texts(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        clip = self._clip.to(images.device)
        seen = clip.image(images)
        return [self.mapped((seen * clip.text(prompts)).sum(1)) for prompts in texts]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.of_texts(images, [prompts])[0]


@register("reward", "clip")
@dataclass(frozen=True)
class ClipSimilarity(_ClipReward):
    """Agreement of image and prompt: e·c, or CLIPScore max(100·e·c, 0).

    e and c are the embeddings of the image and of the prompt, divided by their norms.

    path: a CLIP model in the transformers layout (a hub id with download).
    scale: "cosine", −1 to 1, or "clipscore", 0 to 100 (its gradient is 0 where e·c < 0).
    dtype: of the encoders; scores are float32.
    download: fetch files that are not in the local cache from the Hub.
    """

    path: str
    scale: Literal["cosine", "clipscore"] = "cosine"
    dtype: Dtype = "float32"
    download: bool = False

    reference: ClassVar[str] = "CLIPScore (Hessel et al., 2021), arXiv:2104.08718, eq. 1"

    def mapped(self, cosine: Tensor) -> Tensor:
        return cosine if self.scale == "cosine" else (100 * cosine).clamp(min=0)


@register("reward", "pickscore")
@dataclass(frozen=True)
class PickScore(_ClipReward):
    """Human preference learned from pairs: exp(logit_scale)·e·c / divisor of a tuned CLIP-H.

    e and c are the embeddings of the image and of the prompt, divided by their norms.

    path: `yuvalkirstain/PickScore_v1` with the tokenizer files of CLIP-ViT-H-14 beside it.
    divisor: 1 is the published score, 26 brings it near 0 to 1.
    dtype: of the encoders; scores are float32.
    download: fetch files that are not in the local cache from the Hub.
    """

    path: str
    divisor: Positive = 1.0
    dtype: Dtype = "float32"
    download: bool = False

    reference: ClassVar[str] = "Pick-a-Pic (Kirstain et al., 2023), arXiv:2305.01569, eq. 1"

    def mapped(self, cosine: Tensor) -> Tensor:
        return cosine * (self._clip.temperature / self.divisor)


@register("reward", "hpsv2")
@dataclass(frozen=True)
class HPSv2(_ClipReward):
    """Human Preference Score v2 and v2.1: e·c of a fine-tuned CLIP ViT-H/14.

    e and c are the embeddings of the image and of the prompt, divided by their norms. The longest
    side becomes 224 pixels and the rest of the square zeros, as in the authors' code.

    path: a folder written by `python -m scripts.rewards.convert` from `HPS_v2_compressed.pt` or
        `HPS_v2.1_compressed.pt`.
    dtype: of the encoders; scores are float32.
    """

    path: str
    dtype: Dtype = "float32"

    reference: ClassVar[str] = "Human Preference Score v2 (Wu et al., 2023), arXiv:2306.09341"

    @cached_property
    def _clip(self) -> Clip:
        from sampler.rewards.encoders import Clip
        from sampler.rewards.preprocess import padded_pixels

        return Clip(self.path, self.dtype, self.download, padded_pixels)


@register("reward", "aesthetic")
@dataclass(frozen=True)
class Aesthetic(_ClipReward):
    """LAION's aesthetic predictor, about 1 to 10: five linear layers on e of CLIP ViT-L/14.

    e is the embedding of the image, divided by its norm. Without activations between them the
    layers are one affine map of e; they are evaluated one by one, as published. The prompt is not
    used.

    path: CLIP ViT-L/14 in the transformers layout (a hub id with download).
    head: a folder written by `python -m scripts.rewards.convert` from
        `sac+logos+ava1-l14-linearMSE.pth`.
    dtype: of the encoder; the head is float32.
    download: fetch files that are not in the local cache from the Hub.
    """

    path: str
    head: str
    dtype: Dtype = "float32"
    download: bool = False

    reference: ClassVar[str] = "improved-aesthetic-predictor (Schuhmann, 2022)"

    @property
    def reads_prompt(self) -> bool:
        return False

    @cached_property
    def _head(self) -> Any:
        from sampler.rewards.heads import ScoreHead, read_weights

        weights = read_weights(self.head, "model.safetensors")
        size = self._clip.model.config.projection_dim
        head = ScoreHead(size)
        found = weights.get("layers.0.weight")
        if found is None or found.shape[1] != size:
            where = Path(self.head) / "model.safetensors"
            raise ModelError(
                f"{where} is not an aesthetic head for embeddings of {size}: use CLIP ViT-L/14, "
                "and the head written by python -m scripts.rewards.convert.",
            )
        head.load_state_dict(weights)
        return head.eval().requires_grad_(False)

    def check(self) -> None:
        _ = self._head

    def of_texts(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        embedding = self._clip.to(images.device).image(images)
        return [self._head.to(images.device)(embedding)] * len(texts)
