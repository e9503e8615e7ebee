"""Stand-in for the adapter of a hosted engine: what workers and commands ask of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sampler.core.errors import ModelError, UsageError
from sampler.core.stock_schedule import schedule_of
from sampler.pipelines.call_arguments import (
    arguments,
    default_of,
    embeds_scale,
    scale_name,
    scheduler_of,
)
from sampler.types import Level

_JUMPING = ("LCMScheduler", "SCMScheduler", "CMStochasticIterativeScheduler",
            "FlowMatchLCMScheduler")  # fmt: skip
_AUDIO = ("Audio", "Music", "Spectrogram", "AceStep", "DanceDiffusion")


class HostedPipeline:
    """Pipeline class without an adapter; see `sampler.core.adapter.PipelineAdapter`.

    scale_argument: name of the guidance scale of classifier-free guidance in the pipeline's call,
    None without one. Raises ModelError for a scheduler whose levels are not known.
    """

    network_name = ""
    models = ("main",)
    networks: Mapping[str, Any] = {}
    classes = None
    student = None
    frames = None
    embedded_scale = 1.0
    factor = 8

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        name = type(pipe).__name__
        base = scheduler_of(pipe)
        if base is None:
            raise ModelError(f"{name} has no scheduler, so it cannot be hosted.")
        try:
            self.schedule = schedule_of(base.config, type(base).__name__)
        except ValueError as error:
            raise ModelError(f"{name} cannot be hosted: {error}") from None
        known = arguments(type(pipe))
        self.takes_classes = "class_labels" in known and "prompt" not in known
        self.makes_audio = any(part in name for part in _AUDIO)
        self.scale_argument: str | None = None
        if "true_cfg_scale" in known:
            self.scale_argument = "true_cfg_scale"
        elif (own := scale_name(type(pipe))) in known and not embeds_scale(type(pipe)):
            self.scale_argument = own
        elif "max_guidance_scale" in known:  # of the last frame
            self.scale_argument = "max_guidance_scale"

    @property
    def sample_rate(self) -> int | None:
        """Samples per second of the sounds that the pipeline makes, None if it does not say."""
        for part in (self.pipe, *(getattr(self.pipe, n, None) for n in ("vae", "vocoder", "unet"))):
            for owner in (part, getattr(part, "config", None)):
                for name in ("sampling_rate", "sample_rate"):
                    if isinstance(found := getattr(owner, name, None), int):
                        return found
        return None

    @property
    def reads_alpha(self) -> bool:
        """Return whether the autoencoder takes images with alpha."""
        config = getattr(getattr(self.pipe, "vae", None), "config", None)
        return 4 in (getattr(config, "input_channels", 3), getattr(config, "in_channels", 3))

    @property
    def network(self) -> Any:
        raise UsageError(
            f"{type(self.pipe).__name__} is hosted: its networks are its own, so it cannot be "
            "trained, calibrated or run step by step; use generate."
        )

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the networks."""
        return self.pipe.dtype

    @property
    def default_sampler(self) -> str:
        """Sampler of an engine over the pipeline: that of the scheduler of a consistency model."""
        return "consistency" if type(scheduler_of(self.pipe)).__name__ in _JUMPING else "ddim"

    @property
    def default_guidance(self) -> dict[str, Any]:
        """CFG at the default scale of the pipeline's call; none where its guidance is off."""
        name = self.scale_argument
        scale = None if name is None else default_of(type(self.pipe), name)
        if scale is None and (scales := default_of(type(self.pipe), "guidance_schedule")):
            scale = scales[0]  # of the first step
        if not isinstance(scale, (int, float)) or scale <= 1 or name == "true_cfg_scale":
            return {"name": "none"}
        return {"name": "cfg", "scale": float(scale)}

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the given (height, width); 0 where the pipeline decides."""
        return height or 0, width or 0

    def grid(self, steps: int, size: tuple[int, int]) -> tuple[Level, ...]:
        """Return the levels of a run, without a shift that depends on the image size."""
        return self.schedule.grid(steps, mu=1.0 if self.schedule.dynamic else None)

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock of a batch; the engine's call holds those of the networks."""
        return nullcontext()
