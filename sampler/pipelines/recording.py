"""Recordings of a network: outputs of its blocks, and attention of the image to the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sampler.pipelines.layouts import ImageTokens

INPUT = "input"  # the block before all others: the network's input itself
_LISTS = ("transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks",
          "blocks", "layers")  # fmt: skip
_UNET = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass
class Recording:
    """Content of a recording, one entry per call of the network.

    blocks: {block: [R, C, h, w] or [R, N, C] of the image}; attention: {layer: [R, N, T]}, mean
    over the heads of the probabilities of N image tokens on T text tokens, float32. Rows R are
    those of the network, all branches of a step. full: with attention = "grad", the probabilities
    of all heads and tokens.
    """

    blocks: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    attention: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    full: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]], repr=False)

    def weighted(self, score: Tensor) -> dict[str, Tensor]:
        """Maps {layer: [R, N, T]} of the last call, weighted by the derivative of a score [R].

            mean over heads of relu(∂ Σ score / ∂A) · A

        Needs a recording with attention = "grad" and the graph of its call. Grad-SAM (Barkan et
        al., 2021), arXiv:2204.11073.
        """
        last = {name: found[-1] for name, found in self.full.items()}
        values = [full.values for full in last.values()]
        slopes = torch.autograd.grad(score.sum(), values, allow_unused=True)
        return {
            name: full.text(full.values.detach() * (0 if slope is None else slope.relu()))
            for (name, full), slope in zip(last.items(), slopes, strict=True)
        }


@dataclass
class Full:
    """Probabilities [R, heads, S, K] of a layer, and where image and text are in them."""

    values: Tensor
    places: ImageTokens
    count: int
    texts: tuple[int, ...]

    def text(self, values: Tensor) -> Tensor:
        """Mean over heads of the image's rows and the text's columns, [R, N, T]."""
        mean = values.mean(1)
        if self.places.layout.image == "all":
            return mean
        rows, length = mean.shape[0], mean.shape[1]
        places = ImageTokens(self.places.layout)
        places.count, places.texts = self.count, list(self.texts)
        parts = []
        for row, first in zip(mean, places.first(rows, length), strict=True):
            stop = first + self.count
            text = row[first:stop, stop:] if first == 0 else row[first:stop, :first]
            parts.append(text)
        width = max(part.shape[1] for part in parts)
        return torch.stack([pad(part, (0, width - part.shape[1])) for part in parts])


def blocks_of(network: Any) -> dict[str, str]:
    """{block: module} of a network: down.i, mid and up.i of UNets, blocks.i of transformers.

    The blocks of transformers are numbered through all their lists. Empty for other networks.
    """
    found: dict[str, str] = {}
    for name, child in network.named_children():
        if name in _UNET and isinstance(child, nn.ModuleList):
            found |= {f"{_UNET[name]}.{i}": f"{name}.{i}" for i in range(len(child))}
        elif name in _UNET:
            found[_UNET[name]] = name
        elif name in _LISTS and isinstance(child, nn.ModuleList):
            first = len(found)
            found |= {f"blocks.{first + i}": f"{name}.{i}" for i in range(len(child))}
    if "mid" in found:  # registered last
        ups = {name: found.pop(name) for name in [*found] if name.startswith("up.")}
        found |= {"mid": found.pop("mid"), **ups}
    return found
