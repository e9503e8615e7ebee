"""The bundled few-step student: a latent consistency model, stored as a difference to its teacher.

    W = W_teacher + scale·D      D: int8, one float32 scale per output channel

Vectors (biases, norms) are stored as float16 differences, and what the teacher does not have (the
layer that takes in the guidance scale) as it is. So the student adds a byte per weight to the
package; rounding adds 0.3 % of the largest difference of a channel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sampler.bundled import FOLDER

STUDENT = FOLDER / "lcm"


def packed(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to store for a student's weights: "name", and "name:scale" for int8 ones."""
    stored = {}
    for name, value in student.items():
        value = value.detach().cpu().float()
        if name not in teacher:
            stored[name] = value.half()
            continue
        change = value - teacher[name].cpu().float()
        if change.ndim < 2:
            stored[name] = change.half()
            continue
        scale = change.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        rows = scale.view(-1, *[1] * (change.ndim - 1))
        stored[name] = (change / rows).round().to(torch.int8)
        stored[f"{name}:scale"] = scale
    return stored


def unpacked(stored: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's weights, float32, from what `packed` gave."""
    weights = {}
    for name, value in stored.items():
        if name.endswith(":scale"):
            continue
        value = value.float()
        if (scale := stored.get(f"{name}:scale")) is not None:
            value = value * scale.view(-1, *[1] * (value.ndim - 1))
        weights[name] = value + teacher[name].float() if name in teacher else value
    return weights


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
