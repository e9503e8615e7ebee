"""Distilled students: read from a folder beside their teacher, written as a stock pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sampler.core.binding import network_hash
from sampler.core.errors import ModelError
from sampler.models import preflight
from sampler.models.difference import load_difference
from sampler.models.lora import merge_lora, put_lora
from sampler.models.read import load_or_refuse, refuse_missing_weights
from sampler.models.student_files import WEIGHTS, read_manifest, student_folder

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from sampler.pipelines import Adapter

N = TypeVar("N", bound="ModelMixin")


def with_student(adapter: Adapter, source: str | Path) -> Adapter:
    """The adapter with the student of a folder as its model "student".

    source: the folder, or the run folder of `sampler finetune`. Raises ModelError for a folder
    without a student, a damaged one, and one that was distilled from another network.
    """
    folder = student_folder(source)
    manifest, teacher = read_manifest(folder), adapter.network
    if manifest["base"] != network_hash(teacher):
        raise ModelError(f"{folder} was distilled from another model; load the one it came from.")
    if manifest["form"] == "full":
        student = read_network(teacher, folder / adapter.network_name)
    else:
        student = copy.deepcopy(teacher)
        if manifest["form"] == "difference":
            load_difference(student, folder / WEIGHTS, teacher)
        else:
            put_lora(student, adapter.network_name, folder)
            merge_lora(student)
    twin = adapter.with_network("student", student)
    twin.student = manifest
    return twin


def read_network(like: N, folder: Path) -> N:
    """A network of the class, dtype and device of another, from a component's folder.

    Raises ModelError.
    """
    preflight.check_component(folder)
    options: Any = {"local_files_only": True, "use_safetensors": True, "torch_dtype": like.dtype}
    with refuse_missing_weights(folder):
        network: Any = load_or_refuse(folder, lambda: type(like).from_pretrained(folder, **options))
    return network.to(like.device).eval()


def save_student_pipeline(
    pipe: DiffusionPipeline, network_name: str, student: ModelMixin, folder: Path, own: bool = False
) -> None:
    """Writes a copy of the pipeline around the student, for stock diffusers.

    A variance-preserving pipeline gets an LCM scheduler; call it with num_inference_steps=1 and
    guidance_scale=1, or with the manifest's timesteps. own: the student walks its own deterministic
    trajectory; it gets a DDIM scheduler, whose num_inference_steps=K are at the student's times
    where these are spaced evenly (999, 749, 499, 249).
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    twin = copy.copy(pipe)
    setattr(twin, network_name, student)
    if "beta_start" in pipe.scheduler.config:
        config = pipe.scheduler.config
        twin.scheduler = (
            DDIMScheduler.from_config(config, timestep_spacing="trailing")
            if own
            else LCMScheduler.from_config(config)
        )
    twin.save_pretrained(folder, safe_serialization=True)
