"""Sana: linear attention on strongly compressed latents, Gemma as text encoder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer
from sampler.types import Cond, Level


@adapter("SanaPipeline")
class Sana(FlowTransformer):
    """Velocity prediction at times 0..1000 times the network's `timestep_scale`.

    Prompts are preceded by the stock pipeline's instruction to the language model. Images have the
    requested size; `use_resolution_binning` is not supported.
    """

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        signature = inspect.signature(type(self.pipe).__call__)
        states, mask, uncond, uncond_mask = self.encode_prompt(
            list(prompts),
            guided,
            negative_prompt=list(negative),
            device=self.device,
            complex_human_instruction=signature.parameters["complex_human_instruction"].default,
        )
        cond = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        if not guided:
            return Cond(cond)
        return Cond(cond, {"encoder_hidden_states": uncond, "encoder_attention_mask": uncond_mask})

    @property
    def unit(self) -> int:
        return max(32, self.factor * self.patch)  # as in the stock pipeline

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        network = self.networks[model]
        time = self.row_times(level, x) * network.config.timestep_scale
        cond = {**cond, "encoder_hidden_states": cond["encoder_hidden_states"].to(x.dtype)}
        return network(x, timestep=time, return_dict=False, **cond)[0][:, : x.shape[1]]
