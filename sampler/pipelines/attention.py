"""Access to a network's attention: recorded, or mixed with that to a negative prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from sampler.core.denoisers import BatchedDenoiser
from sampler.core.stacking import stack
from sampler.pipelines.layouts import layout_of
from sampler.pipelines.negative import mixed, paired
from sampler.pipelines.recording import INPUT, Recording, blocks_of
from sampler.pipelines.recording_hooks import recorded
from sampler.types import Level


class NetworkAttention(BatchedDenoiser):
    """Part of an adapter that reaches into its networks."""

    network: Any
    networks: Mapping[str, Any]

    def network_at(self, level: Level, model: str) -> Any:
        """Network that is called at a level."""
        return self.networks[model]

    def text_states(self, cond: Any, model: str) -> Tensor | None:
        """Text states [R, L, C] of a condition, as the attention takes them."""
        raise NotImplementedError

    def mixed_rows(self, model: str) -> int:
        return layout_of(self.networks[model]).rows

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks that can be recorded: "input", then those of the network."""
        return (INPUT, *blocks_of(self.network))

    def recording(
        self,
        blocks: Sequence[str] = (),
        attention: bool | Literal["grad"] = False,
        model: str = "main",
    ) -> AbstractContextManager[Recording]:
        """Record what a network does inside a `with` statement, by this thread.

            with adapter.recording(("up.0",), attention=True) as seen:
                engine.generate("a fox", steps=4)
            seen.blocks["up.0"][0]      # [R, C, h, w] of the first step

        blocks: names out of `blocks`. attention: also the probabilities of image tokens on text
        tokens, in the layers inside these blocks, of the whole network where none is named. Images
        are bit-equal with and without; with "grad" the network computes with these probabilities,
        rounded differently, so that scores can be differentiated (`Recording.weighted`).

        Raises ValueError for an unknown block, and for a network whose attention is not torch's or
        is not known here.
        """
        return recorded(self.networks[model], blocks, attention)

    def check_mixed(self) -> None:
        """Raise ValueError for a network whose attention cannot hold a negative prompt."""
        layout_of(self.network)

    def forward_mixed(
        self, x: Tensor, level: Level, cond: Any, negative: Any, mixing: Any, model: str
    ) -> Tensor:
        network = self.network_at(level, model)
        if self.mixed_rows(model) == 1:
            with mixed(network, mixing, self.text_states(negative, model)):
                return self.forward(x, level, cond, model)
        twice = Level(
            *(torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for v in level)
        )
        with mixed(network, mixing):
            both = paired(cond, negative, stack)
            return self.forward(torch.cat([x, x]), twice, both, model)[: x.shape[0]]
