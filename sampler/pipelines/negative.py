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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sampler.pipelines.layouts import AttentionLayout, ImageTokens, layout_of

Mixing = Callable[[Tensor, Tensor], Tensor]  # of attention outputs [R, tokens, channels]

# Inputs that are text, by name; the others of a negative row are those of the positive one, since
# pooled texts modulate the image's tokens too.
TEXT = re.compile(r"encoder_.*|text_embedding_mask.*|states|mask|prompt_embeds.*")


@contextmanager
def mixed(network: Any, mixing: Mixing, negative: Any = None) -> Iterator[None]:
    """Inside, `network` mixes what its image tokens attend to.

    negative: text states [R, L, C] as the attention takes them, for layouts of one row; the others
    are called on [positive; negative] rows. Raises ValueError where no attention was mixed: its
    processors compute attention themselves.
    """
    layout = layout_of(network)
    call = _Call(network, layout, mixing, negative)
    handles = [network.register_forward_pre_hook(call.places.read, with_kwargs=True)]
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

    def __init__(self, network: Any, layout: AttentionLayout, mixing: Any, negative: Any) -> None:
        self.network, self.layout, self.mixing, self.negative = network, layout, mixing, negative
        self.modes: list[_Attention] = []
        self.places = ImageTokens(layout)
        self.mixes, self.processor = 0, ""

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
        if self.layout.image == "all":
            return None
        first = self.places.first(tokens.shape[0], tokens.shape[1])
        steps = torch.arange(self.places.count, device=tokens.device)
        return torch.tensor(first, device=tokens.device)[:, None] + steps


def _tokens(out: Tensor) -> Tensor:
    """[R, heads, T, D] as [R, T, heads·D]."""
    return out.transpose(1, 2).flatten(2)


def _heads(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.to(like.dtype).unflatten(2, (like.shape[1], -1)).transpose(1, 2)
