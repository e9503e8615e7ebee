"""A student on disk, read back, and at work.

RUN/student/manifest.json    what it is: base, divergence, baked guidance, times, prediction
full:   an ordinary diffusers pipeline with the student as its network
lora:   pytorch_lora_weights.safetensors, for `load_lora_weights` on the base pipeline
difference:   student.safetensors, the network as int8 differences to its teacher
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler import registry
from sampler.core.binding import fingerprint
from sampler.core.durable import write_file, write_folder
from sampler.engine import Engine
from sampler.model_files.student import FORMAT, MANIFEST
from sampler.models.lora import save_lora
from sampler.models.student import save_student_pipeline
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
    """Writes the averaged student, with its manifest, in place of the folder."""
    made, pipeline = session.adapter, session.engine.pipeline
    manifest = {**more, **manifest_of(trainer, session)}
    with write_folder(folder) as written, made.averaged():
        if made.lora is not None:
            save_lora(made.lora, pipeline.network_name, written, manifest)
        else:
            student, dtype = made.student, pipeline.network.dtype
            if dtype != student.dtype:
                student = copy.deepcopy(student).to(dtype)
            save_student_pipeline(pipeline.pipe, pipeline.network_name, student, written)
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        write_file(written / MANIFEST, text.encode())
    return folder
