"""Negative prompts inside the attention of a network, for the rule `nag`.

Two ways, after the network's attention:

    one row     UNets: cross-attention to the text is done twice with the same queries, once for
                each prompt; everything else once.
    two rows    transformers: a batch [positive; negative] of the same samples goes through the
                unmodified network, and what the image's tokens attend to is mixed in both halves.
                The image streams stay equal, so that the prediction is the first half.

The mixing happens between the attention and its output projection. Modules get hooks that are
removed after the call; processors are not replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

Mixing = Callable[[Tensor, Tensor], Tensor]  # of attention outputs [R, tokens, channels]

# Inputs that are text, by name; the others of a negative row are those of the positive one, since
# pooled texts modulate the image's tokens too.
TEXT = re.compile(r"encoder_.*|text_embedding_mask.*|states|mask|prompt_embeds.*")
_ONES = 32  # Z-Image fills its sequences to multiples of this


@dataclass(frozen=True)
class Layout:
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
LAYOUTS: Mapping[str, Layout] = {
    "UNet2DConditionModel": Layout(r".*\.attn2", rows=1),
    "PixArtTransformer2DModel": Layout(r"transformer_blocks\.\d+\.attn2"),
    "SanaTransformer2DModel": Layout(r"transformer_blocks\.\d+\.attn2"),
    "HunyuanDiT2DModel": Layout(r"blocks\.\d+\.attn2", pooling="time_extra_emb"),
    "WanTransformer3DModel": Layout(r"blocks\.\d+\.attn2"),
    "SD3Transformer2DModel": Layout(_JOINT, "first"),
    "QwenImageTransformer2DModel": Layout(_JOINT, "last"),
    "FluxTransformer2DModel": Layout(rf"(single_)?{_JOINT}", "last"),
    "Flux2Transformer2DModel": Layout(rf"(single_)?{_JOINT}", "last"),
    "AuraFlowTransformer2DModel": Layout(rf"(joint|single)_{_JOINT}", "last"),
    "Lumina2Transformer2DModel": Layout(r"layers\.\d+\.attn", "after text"),
    "ZImageTransformer2DModel": Layout(r"layers\.\d+\.attention", "first"),
}


def layout_of(network: Any) -> Layout:
    """The layout of a network's attention.

    Raises ValueError for a network without one and for a compiled one, whose attention is out of
    reach.
    """
    name = type(network).__name__
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in network.modules()):
        raise ValueError("nag: the network is compiled; load it without compile.")
    if name not in LAYOUTS:
        raise ValueError(
            f"nag: the attention of {name} is none of cross-attention, dual-stream and "
            f"single-stream as they are known here; networks with one: {', '.join(LAYOUTS)}."
        )
    return LAYOUTS[name]


@contextmanager
def mixed(network: Any, mixing: Mixing, negative: Any = None) -> Iterator[None]:
    """Inside, `network` mixes what its image tokens attend to.

    negative: text states [R, L, C] as the attention takes them, for layouts of one row; the others
    are called on [positive; negative] rows. Raises ValueError where no attention was mixed: its
    processors compute attention themselves.
    """
    layout = layout_of(network)
    call = _Call(network, layout, mixing, negative)
    handles = [network.register_forward_pre_hook(call.begin, with_kwargs=True)]
    for name, module in network.named_modules():
        if name and name == layout.pooling:
            handles.append(module.register_forward_hook(_first_half))
        if re.fullmatch(layout.attentions, name):
            handles.append(module.register_forward_pre_hook(call.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(call.leave, always_call=True))
    try:
        yield
        call.check()
    finally:
        for handle in handles:
            handle.remove()
        if close := getattr(mixing, "close", None):
            close()


def paired(positive: Any, negative: Any, join: Callable[[list[Any]], Any]) -> Any:
    """The conditions of [positive; negative] rows: `join` of both, of the texts' tensors."""
    both = {k: negative[k] if TEXT.fullmatch(k) else positive[k] for k in positive}
    return join([positive, both])


def _first_half(module: Any, args: Any, out: Tensor) -> Tensor:
    return out.chunk(2)[0].repeat(2, *(1,) * (out.ndim - 1))


class _Attention(TorchFunctionMode):
    """Inside, outputs of torch's attention are changed."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return self.change(out) if func is scaled_dot_product_attention else out


class _Call:
    """Hooks of one call of a network."""

    def __init__(self, network: Any, layout: Layout, mixing: Any, negative: Any) -> None:
        self.network, self.layout, self.mixing, self.negative = network, layout, mixing, negative
        self.modes: list[_Attention] = []
        self.count, self.texts = 0, list[int]()
        self.mixes, self.processor = 0, ""

    def begin(self, network: Any, args: Any, kwargs: Any) -> None:
        """Read the number of image tokens from the network's inputs."""
        if self.layout.image != "all":
            named = [kwargs[name] for name in ("hidden_states", "x") if name in kwargs]
            self.count = image_tokens(network, (*args, *named)[0])
        if self.layout.image == "after text":
            mask = args[3] if len(args) > 3 else kwargs["encoder_attention_mask"]
            self.texts = mask.sum(1).tolist()

    def enter(self, module: Any, args: Any, kwargs: Any) -> None:
        self.processor = type(getattr(module, "processor", module)).__name__
        change = self._halves
        if self.layout.rows == 1:
            if kwargs.get("encoder_hidden_states") is None:
                change = lambda out: out  # noqa: E731  self-attention
            else:
                change = partial(self._mixed, self._to_negative(module, args, kwargs))
        self.modes.append(_Attention(change))
        self.modes[-1].__enter__()

    def leave(self, module: Any, args: Any, out: Any) -> None:
        if self.modes:
            self.modes.pop().__exit__(None, None, None)

    def check(self) -> None:
        if not self.mixes:
            raise ValueError(
                f"nag: this network's attention ({self.processor}) is not torch's "
                "scaled_dot_product_attention; use attention='native'."
            )

    def _to_negative(self, module: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The attention output of the same queries for the negative prompt."""
        kept: list[Tensor] = []

        def keep(out: Tensor) -> Tensor:
            kept.append(out)
            return out

        given = {"encoder_hidden_states": self.negative, "attention_mask": None}
        with _Attention(keep):
            module.forward(*args, **{**kwargs, **given})
        return kept[0] if kept else None

    def _mixed(self, negative: Tensor | None, positive: Tensor) -> Tensor:
        if negative is None:
            return positive
        self.mixes += 1
        return _heads(self.mixing(_tokens(positive), _tokens(negative)), positive)

    def _halves(self, out: Tensor) -> Tensor:
        """Mix the image's tokens of [positive; negative] rows, in both halves."""
        self.mixes += 1
        tokens = _tokens(out)
        at = self._image(tokens)
        if at is None:
            return _heads(self.mixing(*tokens.chunk(2)).repeat(2, 1, 1), out)
        at = at[..., None].expand(-1, -1, tokens.shape[-1])
        image = self.mixing(*tokens.gather(1, at).chunk(2)).repeat(2, 1, 1)
        return _heads(tokens.scatter(1, at, image.to(tokens.dtype)), out)

    def _image(self, tokens: Tensor) -> Tensor | None:
        """Places [2R, N] of the image's tokens; None for all."""
        where, rows = self.layout.image, tokens.shape[0]
        if where == "all":
            return None
        first = self.texts or [0 if where == "first" else tokens.shape[1] - self.count] * rows
        steps = torch.arange(self.count, device=tokens.device)
        return torch.tensor(first, device=tokens.device)[:, None] + steps


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


def _tokens(out: Tensor) -> Tensor:
    """[R, heads, T, D] as [R, T, heads·D]."""
    return out.transpose(1, 2).flatten(2)


def _heads(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.to(like.dtype).unflatten(2, (like.shape[1], -1)).transpose(1, 2)
