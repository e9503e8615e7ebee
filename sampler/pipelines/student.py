"""A distilled student as an ordinary diffusers pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_lcm import LCMScheduler


def save_student_pipeline(pipe: Any, network_name: str, student: Any, folder: Path) -> None:
    """Writes the pipeline with another network, and with a scheduler for few steps where it is
    variance preserving; the pipeline itself is left alone.

    Stock: `pipe(prompt, num_inference_steps=1, guidance_scale=1)`, or `timesteps=[...]`.
    """
    twin = copy.copy(pipe)
    setattr(twin, network_name, student)
    if "beta_start" in pipe.scheduler.config:
        twin.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    twin.save_pretrained(folder, safe_serialization=True)
