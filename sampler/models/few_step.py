"""The bundled few-step student: a latent consistency model, stored as a difference to its teacher
(`sampler/models/difference.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from sampler.bundled import FOLDER
from sampler.models.difference import load_difference
from sampler.models.student_files import WEIGHTS

STUDENT = FOLDER / "lcm"


def network(teacher: UNet2DConditionModel, folder: Path = STUDENT) -> torch.nn.Module:
    """The student's UNet, with the dtype and device of its teacher, which is not changed."""
    config = {
        **teacher.config,
        "time_cond_proj_dim": distillation_settings(folder)["time_cond_proj_dim"],
    }
    student: Any = type(teacher).from_config(config)
    load_difference(student, folder / WEIGHTS, teacher)
    # torch's own `to`: diffusers' logs remarks on dtypes that do not apply here
    torch.nn.Module.to(student, teacher.device, teacher.dtype)
    return student.eval()


def pipeline(teacher: DiffusionPipeline, folder: Path = STUDENT) -> LatentConsistencyModelPipeline:
    """A stock LatentConsistencyModelPipeline around the student, with the teacher's other parts."""
    steps = distillation_settings(folder)["original_inference_steps"]
    parts: dict[str, Any] = {
        **{name: getattr(teacher, name) for name in ("vae", "text_encoder", "tokenizer")},
        "unet": network(teacher.unet, folder),
        "scheduler": LCMScheduler.from_config(
            teacher.scheduler.config, original_inference_steps=steps, set_alpha_to_one=True
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }
    student = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    student.set_progress_bar_config(disable=True)
    return student


def distillation_settings(folder: Path = STUDENT) -> dict[str, Any]:
    """Settings of the distillation: config.json of the student's folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
