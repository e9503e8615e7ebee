"""Rules as guiders of Modular Diffusers; experimental, like diffusers' own guiders.

    blocks = pipeline.update_components(guider=RuleGuider({"name": "apg", "space": "native"}))

A guider receives predictions, step and timestep, but neither x_t nor alpha and sigma, so only rules
on the network's own output are supported; use `sampler.load` or `sampler.guide` for the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from sampler_kernels import settle
from torch import Tensor

from sampler import registry
from sampler.types import Cond, Guidance, GuidanceBase, Level, Prediction, Span


class RuleGuider(BaseGuidance):
    """Diffusers guider of a rule over the conditional and the unconditional prediction.

    rule: a name or a mapping; prediction: output of the network, "eps", "v" or "velocity". Step 0
    resets the state. Batches are not compacted: the unconditional pass is skipped where no sample
    needs it.

    Raises ValueError for a rule that needs levels, another network or classes.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(self, rule: Any = "cfg", prediction: str = "eps") -> None:
        super().__init__()
        built = registry.build("guidance", rule)
        if reason := _needs_more(built):
            raise ValueError(
                f"A guider cannot serve {built.name!r} here: {reason}; use sampler.load(pipe) or "
                "sampler.guide."
            )
        self.rule: Guidance = built
        self.prediction = prediction
        self._state: Any = built.start(Cond())

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._state = self.rule.start(Cond())

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if "uncond" in self._plan() else 1

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, i, name) for i, name in self._branches()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return [
            self._prepare_batch_from_block_state(input_fields, data, i, name)
            for i, name in self._branches()
        ]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction in the dtype of `pred_cond`."""
        x, span = torch.zeros_like(pred_cond), self._span()
        outs = {"cond": pred_cond, "uncond": pred_uncond}
        preds = {
            k: Prediction.of(self.prediction, x, v, span.now)
            for k, v in outs.items()
            if v is not None
        }
        guided, state = self.rule.combine(x, preds, span, self._state)
        value, self._state = settle((guided.out, state))
        value = value.to(pred_cond.dtype)
        if self._step is not None and self._step + 1 == self._num_inference_steps:
            # the next run reads the number of conditions before it sets a step
            self._step, self._state = 0, self.rule.start(Cond())
        return GuiderOutput(pred=value, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _branches(self) -> list[tuple[int, str]]:
        return list(enumerate(self._input_predictions[: self.num_conditions]))

    def _plan(self) -> Mapping[str, Any]:
        return self.rule.plan(None, self._span(), Cond("cond", "uncond"), self._state)  # pyright: ignore[reportArgumentType]

    def _span(self) -> Span:
        nowhere = Level(self._timestep, math.nan, math.nan)
        return Span(self._step or 0, nowhere, nowhere)


def _needs_more(rule: Any) -> str:
    """Reason why a rule cannot run on predictions alone; "" if it can."""
    if extra := rule.needs - {"cond", "uncond"}:
        return f"it needs {min(extra)!r}"
    if rule.name == "forecast":
        return "it leaves whole steps out, and a guider is given a prediction at every one"
    inner = getattr(rule, "rule", None)
    if type(rule).bind is not GuidanceBase.bind and inner is None:
        return "it has to be bound to a model"
    if getattr(rule, "interval", None) is not None:
        return "an interval of noise levels is not known to a guider (window is)"
    if getattr(rule, "zero_init_steps", 0):
        return "its zero start needs the levels; set zero_init_steps = 0"
    for name in ("space", "rescale_space"):
        if getattr(rule, name, "native") not in ("native", "auto"):
            return f"{name} must be 'native'"
    return _needs_more(inner) if inner is not None else ""
