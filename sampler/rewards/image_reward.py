"""ImageReward: human preference by an image-grounded text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from sampler.registry import register
from sampler.rewards.base import Dtype, RewardBase

if TYPE_CHECKING:
    from torch import Tensor

# Mean and standard deviation of the raw scores on the authors' data: the published score is
# (s − mean) / std.
MEAN, STD = 0.16717363, 1.03333949


@register("reward", "image_reward")
@dataclass(frozen=True)
class ImageReward(RewardBase):
    """Human preference: (MLP(first state of BLIP's image-grounded text encoder) − mean) / std.

    Prompts are cut at 35 tokens.

    path: a folder written by `python -m scripts.rewards.convert` from `ImageReward.pt`.
    dtype: of the encoders; the head and the score are float32.
    """

    path: str
    dtype: Dtype = "float32"

    reference: ClassVar[str] = "ImageReward (Xu et al., 2023), arXiv:2304.05977"

    @cached_property
    def _blip(self) -> Any:
        from sampler.rewards.encoders import Blip

        return Blip(self.path, self.dtype)

    def check(self) -> None:
        _ = self._blip

    def of_texts(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        blip = self._blip.to(images.device)
        seen = blip.image(images)
        return [(blip(seen, prompts) - MEAN) / STD for prompts in texts]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.of_texts(images, [prompts])[0]
