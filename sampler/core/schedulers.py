"""Stock diffusers schedulers whose noise levels are supported, with the kind of their process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Process = Literal["vp", "edm", "flow"]

SCHEDULERS: Mapping[str, Process] = {
    "DDIMScheduler": "vp",
    "DDIMParallelScheduler": "vp",
    "CogVideoXDDIMScheduler": "vp",
    "DDPMScheduler": "vp",
    "DDPMParallelScheduler": "vp",
    "PNDMScheduler": "vp",
    "LCMScheduler": "vp",
    "UnCLIPScheduler": "vp",
    "EulerDiscreteScheduler": "vp",
    "EulerAncestralDiscreteScheduler": "vp",
    "HeunDiscreteScheduler": "vp",
    "LMSDiscreteScheduler": "vp",
    "KDPM2DiscreteScheduler": "vp",
    "KDPM2AncestralDiscreteScheduler": "vp",
    "DPMSolverMultistepScheduler": "vp",
    "DPMSolverSinglestepScheduler": "vp",
    "UniPCMultistepScheduler": "vp",
    "DEISMultistepScheduler": "vp",
    "SASolverScheduler": "vp",
    "CogVideoXDPMScheduler": "vp",
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "FlowMatchLCMScheduler": "flow",
}
