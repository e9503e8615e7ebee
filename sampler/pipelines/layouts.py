"""Attention of each class of networks: which modules attend to text, and where the image is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_ONES = 32  # Z-Image fills its sequences to multiples of this


@dataclass(frozen=True)
class AttentionLayout:
    """Attention of a class of networks.

    attentions: pattern of the names of modules in which image tokens attend to text. image: where
    the image's tokens are in their output. rows: rows of the network per sample. pooling: module
    whose output modulates the image's tokens by the pooled text; negative rows get the positive's.
    """

    attentions: str
    image: Literal["all", "first", "last", "after text"] = "all"
    rows: int = 2
    pooling: str = ""


_JOINT = r"transformer_blocks\.\d+\.attn"
LAYOUTS: Mapping[str, AttentionLayout] = {
    "UNet2DConditionModel": AttentionLayout(r".*\.attn2", rows=1),
    "PixArtTransformer2DModel": AttentionLayout(r"transformer_blocks\.\d+\.attn2"),
    "SanaTransformer2DModel": AttentionLayout(r"transformer_blocks\.\d+\.attn2"),
    "HunyuanDiT2DModel": AttentionLayout(r"blocks\.\d+\.attn2", pooling="time_extra_emb"),
    "WanTransformer3DModel": AttentionLayout(r"blocks\.\d+\.attn2"),
    "SD3Transformer2DModel": AttentionLayout(_JOINT, "first"),
    "QwenImageTransformer2DModel": AttentionLayout(_JOINT, "last"),
    "FluxTransformer2DModel": AttentionLayout(rf"(single_)?{_JOINT}", "last"),
    "Flux2Transformer2DModel": AttentionLayout(rf"(single_)?{_JOINT}", "last"),
    "AuraFlowTransformer2DModel": AttentionLayout(rf"(joint|single)_{_JOINT}", "last"),
    "Lumina2Transformer2DModel": AttentionLayout(r"layers\.\d+\.attn", "after text"),
    "ZImageTransformer2DModel": AttentionLayout(r"layers\.\d+\.attention", "first"),
}


def layout_of(network: Any, who: str = "nag") -> AttentionLayout:
    """The layout of a network's attention; `who`: the name that errors begin with.

    Raises ValueError for a network without one and for a compiled one, whose attention is out of
    reach.
    """
    name = type(network).__name__
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in network.modules()):
        raise ValueError(f"{who}: the network is compiled; load it without compile.")
    if name not in LAYOUTS:
        raise ValueError(
            f"{who}: the attention of {name} is none of cross-attention, dual-stream and "
            f"single-stream as they are known here; networks with one: {', '.join(LAYOUTS)}."
        )
    return LAYOUTS[name]


class ImageTokens:
    """Places of the image's tokens in the sequences of a network; `read` is a forward pre-hook."""

    def __init__(self, layout: AttentionLayout) -> None:
        self.layout = layout
        self.count, self.texts = 0, list[int]()

    def read(self, network: Any, args: Any, kwargs: Any) -> None:
        """Read the number of image tokens from the network's inputs."""
        if self.layout.image != "all":
            named = [kwargs[name] for name in ("hidden_states", "x") if name in kwargs]
            self.count = image_tokens(network, (*args, *named)[0])
        if self.layout.image == "after text":
            mask = args[3] if len(args) > 3 else kwargs["encoder_attention_mask"]
            self.texts = mask.sum(1).tolist()

    def first(self, rows: int, length: int) -> list[int]:
        """Number of the first image token in each of `rows` sequences of a length."""
        if self.texts:
            return self.texts
        return [0 if self.layout.image == "first" else length - self.count] * rows


def image_tokens(network: Any, sample: Any) -> int:
    """Number of image tokens that a network makes of its samples."""
    if isinstance(sample, (list, tuple)):  # Z-Image: [C, F, H, W] each
        _, frames, height, width = sample[0].shape
        count = frames * (height // 2) * (width // 2)
        return count + -count % _ONES
    if sample.ndim == 3:
        return sample.shape[1]
    patch = network.config.patch_size
    return (sample.shape[-2] // patch) * (sample.shape[-1] // patch)
