"""AuraFlow: T5 states beside the image's patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer
from sampler.types import Cond, Level


@adapter("AuraFlowPipeline")
class AuraFlow(FlowTransformer):
    """Velocity prediction at times 0..1; text states are zero-padded."""

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        states, _, uncond, _ = self.encode_prompt(
            list(prompts), list(negative), guided, device=self.device
        )
        cond = {"encoder_hidden_states": states}
        return Cond(cond, {"encoder_hidden_states": uncond} if guided else None)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        time = (self.row_times(level, x) / 1000).to(x.dtype)
        return self.networks[model](x, timestep=time, return_dict=False, **cond)[0]
