"""The bundled few-step student: a latent consistency model, stored as a difference to its teacher
(`sampler/models/difference.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sampler.bundled import FOLDER
from sampler.models.difference import unpacked

STUDENT = FOLDER / "lcm"


def network(teacher: Any, folder: Path = STUDENT) -> Any:
    """The student's UNet, of the teacher's class, dtype and device; the teacher is left alone."""
    config = {**teacher.config, "time_cond_proj_dim": settings(folder)["time_cond_proj_dim"]}
    student = type(teacher).from_config(config)
    before = {name: value.cpu() for name, value in teacher.state_dict().items()}
    student.load_state_dict(unpacked(load_file(folder / "student.safetensors"), before))
    # torch's own `to`: diffusers' remarks on dtypes even where there is nothing to say
    return torch.nn.Module.to(student, teacher.device, teacher.dtype).eval()


def pipeline(teacher: Any, folder: Path = STUDENT) -> Any:
    """A stock LatentConsistencyModelPipeline around the student, with the teacher's other parts."""
    from diffusers import (
        LatentConsistencyModelPipeline,  # pyright: ignore[reportPrivateImportUsage]
        LCMScheduler,  # pyright: ignore[reportPrivateImportUsage]
    )

    steps = settings(folder)["original_inference_steps"]
    scheduler: Any = LCMScheduler.from_config(
        teacher.scheduler.config, original_inference_steps=steps, set_alpha_to_one=True
    )
    student = LatentConsistencyModelPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer,
        unet=network(teacher.unet, folder),
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    student.set_progress_bar_config(disable=True)
    return student


def settings(folder: Path = STUDENT) -> dict[str, Any]:
    """What the student was distilled with: config.json of its folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
