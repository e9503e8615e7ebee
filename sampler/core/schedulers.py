"""Stock diffusers schedulers: the kind of process of those whose levels are known, else why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Process = Literal["vp", "edm", "flow", "consistency"]

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
    "RePaintScheduler": "vp",
    "SCMScheduler": "vp",
    "DDPMWuerstchenScheduler": "vp",
    "IPNDMScheduler": "vp",
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "CosineDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "FlowMatchLCMScheduler": "flow",
    "FlowMapEulerDiscreteScheduler": "flow",
    "HeliosScheduler": "flow",
    "CMStochasticIterativeScheduler": "consistency",
}
# Schedulers without levels for a sampler's steps, and why.
WITHOUT_LEVELS: Mapping[str, str] = {
    "AmusedScheduler": "it unmasks tokens, which is discrete diffusion without levels of noise",
    "VQDiffusionScheduler": "it draws tokens, which is discrete diffusion without levels of noise",
    "KarrasVeScheduler": "KarrasVePipeline adds noise before its steps and corrects after them by "
    "other methods of its scheduler",
    "ScoreSdeVeScheduler": "ScoreSdeVePipeline takes Langevin corrections between its steps by "
    "other methods of its scheduler",
}
