"""A student on disk, read back, and at work.

RUN/student/manifest.json    what it is: base, divergence, baked guidance, times, prediction
full:   an ordinary diffusers pipeline with the student as its network
lora:   pytorch_lora_weights.safetensors, for `load_lora_weights` on the base pipeline
difference:   student.safetensors, the network as int8 differences to its teacher
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler import registry
from sampler.core.binding import fingerprint
from sampler.core.durable import TEMPORARY, attempt, make_folder, sync_folder, write_file
from sampler.engine import Engine
from sampler.errors import ModelError, first_line
from sampler.model_files import preflight
from sampler.model_files.student import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    read_manifest,
    student_folder,
)
from sampler.models.lora import merge_lora, put_lora, save_lora
from sampler.training.f_distill.setup import student_levels

if TYPE_CHECKING:
    from sampler.training.f_distill.trainer import FDistill
    from sampler.training.session import Session


def manifest_of(trainer: FDistill, session: Session) -> dict[str, Any]:
    """What a student is, as plain data."""
    pipeline = session.engine.pipeline
    times = [level.t for level in student_levels(trainer, pipeline.schedule)]
    return {
        "kind": "student",
        "format": FORMAT,
        "base": fingerprint(pipeline.network),
        "form": trainer.student,
        "f": trainer.divergence,
        "baked_guidance": registry.spec_of(session.rule),
        "baked_negative": session.negative,
        "timesteps": times,
        "steps": len(times),
        "prediction": pipeline.schedule.prediction,
        "negative_prompt": False,
    }


@contextmanager
def student_session(trainer: FDistill, session: Session) -> Iterator[Session]:
    """Inside, the session samples with the average of the student that is being trained."""
    world = session.adapter.world.with_network("student", session.adapter.student)
    world.student = manifest_of(trainer, session)
    rule = registry.build("guidance", "student")
    method = registry.build("sampler", "consistency")
    engine = Engine(world, world, method, rule)
    steps = world.student["steps"]
    with session.adapter.averaged():
        yield replace(session, engine=engine, method=method, rule=rule, steps=steps, negative="")


def save_student(trainer: FDistill, session: Session, folder: Path, more: dict[str, Any]) -> Path:
    """Writes the average of the student; the folder is there whole or not at all."""
    made, pipeline = session.adapter, session.engine.pipeline
    written = folder.with_name(f"{TEMPORARY}{os.getpid()}")
    shutil.rmtree(written, ignore_errors=True)
    make_folder(written)
    manifest = {**more, **manifest_of(trainer, session)}
    with made.averaged():
        if made.lora is not None:
            save_lora(made.lora, pipeline.network_name, written, manifest)
        else:
            from sampler.pipelines.student import save_student_pipeline

            student, dtype = made.student, pipeline.network.dtype
            if dtype != student.dtype:
                student = copy.deepcopy(student).to(dtype)
            save_student_pipeline(pipeline.pipe, pipeline.network_name, student, written)
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    write_file(written / MANIFEST, text.encode())
    shutil.rmtree(folder, ignore_errors=True)
    attempt(lambda: os.replace(written, folder), folder)
    sync_folder(folder.parent)
    return folder


def with_student(adapter: Any, source: str | Path) -> Any:
    """The adapter of a pipeline, with the student of a folder as its model "student".

    source: the folder, or the run folder of `sampler finetune`. Raises SamplerError (6) where it
    is none, broken, or another pipeline's.
    """
    folder = student_folder(source)
    manifest, network = read_manifest(folder), adapter.network
    if manifest["base"] != fingerprint(network):
        raise ModelError(
            f"{folder} was distilled from another model than this one; load the model that it was "
            "made from.",
        )
    if manifest["form"] == "full":
        student = read_network(network, folder / adapter.network_name)
    elif manifest["form"] == "difference":
        student = read_difference(network, folder / WEIGHTS)
    else:
        student = copy.deepcopy(network)
        put_lora(student, adapter.network_name, folder)
        merge_lora(student)
    twin = adapter.with_network("student", student)
    twin.student = manifest
    return twin


def read_difference(teacher: Any, path: Path) -> Any:
    """The student's network from its difference to the teacher. Raises SamplerError (6)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from sampler.models.difference import unpacked

    student = copy.deepcopy(teacher)
    try:
        student.load_state_dict(unpacked(load_file(path), teacher.state_dict()))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be loaded: {first_line(error)}") from error
    return student


def read_network(like: Any, folder: Path) -> Any:
    """A network of the same class, dtype and device from a component's folder.

    Raises SamplerError (6).
    """
    preflight.check_component(folder)
    try:
        options = {"local_files_only": True, "use_safetensors": True}
        found = type(like).from_pretrained(folder, torch_dtype=like.dtype, **options)
    except Exception as error:
        raise ModelError(f"{folder} cannot be loaded: {first_line(error)}") from error
    return found.to(like.device).eval()
