"""A student on disk, read back, and at work.

RUN/student/manifest.json    what it is: base, divergence, baked guidance, times, prediction
full:   an ordinary diffusers pipeline with the student as its network
lora:   pytorch_lora_weights.safetensors, for `load_lora_weights` on the base pipeline
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

from sampler import preflight, registry
from sampler.binding import fingerprint
from sampler.engine import Engine
from sampler.finetune.f_distill_setup import student_levels
from sampler.finetune.lora import merge_lora, put_lora, save_lora
from sampler.runs.durable import TEMPORARY, attempt, make_folder, sync_folder, write_file
from sampler.types import SamplerError

if TYPE_CHECKING:
    from sampler.finetune.f_distill import FDistill
    from sampler.finetune.session import Session

MANIFEST = "manifest.json"
FORMAT = 1


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

            student = copy.deepcopy(made.student).to(pipeline.network.dtype)
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
    folder = student_folder(Path(source).expanduser())
    manifest, network = read_manifest(folder), adapter.network
    if manifest["base"] != fingerprint(network):
        raise SamplerError(
            f"{folder} was distilled from another model than this one; load the model that it was "
            "made from.",
            6,
        )
    student = copy.deepcopy(network)
    if manifest["form"] == "lora":
        put_lora(student, adapter.network_name, folder)
        merge_lora(student)
    else:
        part = folder / adapter.network_name
        preflight.check_component(part)
        try:
            options = {"local_files_only": True, "use_safetensors": True}
            student = type(network).from_pretrained(part, torch_dtype=network.dtype, **options)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SamplerError(f"{part} cannot be loaded: {reason}", 6) from error
    twin = adapter.with_network("student", student.to(network.device).eval())
    twin.student = manifest
    return twin


def student_folder(source: Path) -> Path:
    """The student's folder in a folder or a run folder. SamplerError (6) without one."""
    for folder in (source, source / "student"):
        if (folder / MANIFEST).is_file():
            return folder
    raise SamplerError(
        f"{source} has no student: {MANIFEST} is neither there nor in student/; make one with "
        "`sampler finetune --trainer f_distill`.",
        6,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a student's folder. SamplerError (6) for one that is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["kind"] == "student" and manifest["format"] == FORMAT
        known = known and manifest["form"] in ("full", "lora", "int8")
        known = known and all(isinstance(t, (int, float)) for t in manifest["timesteps"])
        known = known and isinstance(manifest["base"], str) and "baked_guidance" in manifest
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise SamplerError(f"{folder / MANIFEST} is no manifest of a student.", 6)
    return manifest
