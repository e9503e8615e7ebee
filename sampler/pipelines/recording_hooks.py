"""Recording inside a network, by hooks that are removed at the end.

Processors are not replaced: attention probabilities are computed once more, from the queries and
keys that torch's attention receives, whose output is what the network uses. Images are therefore
bit-equal with and without recording.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from sampler.pipelines.attention_call import Intercepted, probabilities
from sampler.pipelines.layouts import LAYOUTS, ImageTokens, layout_of
from sampler.pipelines.recording import INPUT, Full, Recording, blocks_of


@contextmanager
def recorded(
    network: Any, blocks: Sequence[str] = (), attention: bool | Literal["grad"] = False
) -> Iterator[Recording]:
    """Record the calls of a network by this thread; see `Adapter.recording`."""
    known = blocks_of(network)
    if unknown := [name for name in blocks if name != INPUT and name not in known]:
        raise ValueError(
            f"recording: this network has no block {unknown[0]!r:.40}; it has "
            f"{', '.join([INPUT, *known])}."
        )
    call = RecordingCalls(network, attention)
    chosen = tuple(known[name] for name in blocks if name != INPUT)
    handles: list[Any] = []
    try:
        handles.append(network.register_forward_pre_hook(call.begin, with_kwargs=True))
        if INPUT in blocks:
            call.seen.blocks[INPUT] = []
        for name in blocks:
            if name != INPUT:
                module = network.get_submodule(known[name])
                handles.append(module.register_forward_hook(call.output(name)))
        if attention:
            handles += call.attend(chosen)
        yield call.seen
        if attention and call.calls and not call.found:
            raise ValueError(
                f"recording: this network's attention ({call.processor}) is not torch's "
                "scaled_dot_product_attention; use attention='native'."
            )
    finally:
        for handle in handles:
            handle.remove()
        call.close()


class RecordingCalls:
    """Hooks of a recording; calls of other threads are not recorded."""

    def __init__(self, network: Any, attention: bool | Literal["grad"]) -> None:
        self.network, self.attention = network, attention
        self.seen, self.thread = Recording(), threading.get_ident()
        self.calls, self.found, self.processor = 0, 0, ""
        self.modes: list[tuple[Intercepted, list[Tensor]]] = []
        name = type(network).__name__
        self.layout = layout_of(network, "recording") if attention or name in LAYOUTS else None
        self.places = None if self.layout is None else ImageTokens(self.layout)

    def begin(self, network: Any, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.calls += 1
        if self.places is not None:
            self.places.read(network, args, kwargs)
        if INPUT in self.seen.blocks:
            names = ("sample", "hidden_states", "x")
            sample = (*args, *(kwargs[name] for name in names if name in kwargs))[0]
            if isinstance(sample, list):  # Z-Image: [C, F, H, W] each
                sample = torch.stack(sample)
            self.seen.blocks[INPUT].append(sample)

    def output(self, name: str) -> Any:
        """Hook that records the image in a block's output."""
        kept = self.seen.blocks.setdefault(name, [])

        def keep(module: Any, args: Any, out: Any) -> None:
            if threading.get_ident() == self.thread:
                kept.append(self._image(out))

        return keep

    def _image(self, out: Any) -> Tensor:
        """The image's part of an output: the first of (image, residuals) or (text, image)."""
        parts = [out] if isinstance(out, Tensor) else [v for v in out if isinstance(v, Tensor)]
        maps = [part for part in parts if part.ndim == 4]
        places = self.places
        if maps or places is None or places.layout.image == "all":
            return (maps or parts)[0]
        own = [part for part in parts if part.shape[1] == places.count]
        if own:
            return own[-1]
        both = parts[-1]  # one sequence of text and image
        first = places.first(both.shape[0], both.shape[1])
        rows = [row[at : at + places.count] for row, at in zip(both, first, strict=True)]
        return torch.stack(rows)

    def attend(self, inside: tuple[str, ...]) -> list[Any]:
        """Attach the hooks of the attention layers, of all or those inside some modules."""
        assert self.layout is not None
        handles: list[Any] = []
        for name, module in self.network.named_modules():
            wanted = not inside or any(name.startswith(f"{at}.") for at in inside)
            if wanted and re.fullmatch(self.layout.attentions, name):
                handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
                leave = self.leave(name)
                handles.append(module.register_forward_hook(leave, always_call=True))
        return handles

    def enter(self, module: Any, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.processor = type(getattr(module, "processor", module)).__name__
        kept: list[Tensor] = []
        cross = self.layout is not None and self.layout.rows == 1
        if cross and kwargs.get("encoder_hidden_states") is None:  # self-attention
            mode = Intercepted(lambda **given: None)
        else:
            mode = Intercepted(lambda **given: self._keep(kept, **given))
        self.modes.append((mode, kept))
        mode.__enter__()

    def _keep(
        self, kept: list[Tensor], query: Tensor, key: Tensor, value: Tensor, attn_mask: Any,
        dropout_p: float, is_causal: bool, scale: Any, enable_gqa: bool,
    ) -> Tensor | None:  # fmt: skip
        found = probabilities(query, key, attn_mask, scale, is_causal)
        if self.attention != "grad":
            kept.append(found)
            return None
        if not found.requires_grad:
            found.requires_grad_()
        kept.append(found)
        groups = query.shape[1] // value.shape[1]
        return found.to(value.dtype) @ value.repeat_interleave(groups, 1)

    def leave(self, name: str) -> Any:
        """Hook at the end of a layer; the last attention inside is that of the prompt itself."""
        kept_full = self.seen.full.setdefault(name, [])

        def keep(module: Any, args: Any, out: Any) -> None:
            if threading.get_ident() != self.thread or not self.modes:
                return
            mode, kept = self.modes.pop()
            mode.__exit__(None, None, None)
            if not kept or self.places is None:
                return
            self.found += 1
            full = Full(kept[-1], self.places, self.places.count, tuple(self.places.texts))
            self.seen.attention.setdefault(name, []).append(full.text(full.values.detach()))
            if self.attention == "grad":
                kept_full.append(full)

        return keep

    def close(self) -> None:
        """Leave the layers that an exception has left open."""
        while self.modes:
            self.modes.pop()[0].__exit__(None, None, None)
