"""The student of a run: evaluation and storage.

RUN/student/manifest.json    base, divergence, baked guidance, times, trajectory, prediction
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
from typing import Any

from sampler import registry
from sampler.core.durable import write_file, write_folder
from sampler.engine import Engine
from sampler.models.student import save_student_pipeline
from sampler.models.student_files import FORMAT, MANIFEST
from sampler.models.trainable_lora import save_lora
from sampler.training.f_distill.fields import DistillFields
from sampler.training.f_distill.networks import Distilled
from sampler.training.f_distill.setup import trajectory_of
from sampler.training.session import Session


def student_manifest(trainer: DistillFields, session: Session) -> dict[str, Any]:
    """Describe a student as plain data."""
    times = [level.t for level in trajectory_of(trainer, session).levels]
    return {
        "kind": "student",
        "format": FORMAT,
        "base": session.trainable.base,
        "form": trainer.student,
        "f": trainer.divergence,
        "baked_guidance": registry.spec_of(session.rule),
        "baked_negative": session.negative,
        "timesteps": times,
        "steps": len(times),
        "trajectory": trainer.trajectory,
        "prediction": session.pipeline.schedule.prediction,
        "negative_prompt": False,
    }


@contextmanager
def student_session(session: Session, manifest: dict[str, Any]) -> Iterator[Session]:
    """Give a session that samples with the averaged student, for the time of a context."""
    distilled: Distilled = session.trainable
    adapter = distilled.networks.with_network("student", distilled.student)
    adapter.student = manifest
    rule = registry.build("guidance", "student")
    method = registry.build("sampler", "consistency")
    engine = Engine(adapter, adapter, method, rule)
    steps = manifest["steps"]
    with distilled.ema.in_place():
        yield replace(session, engine=engine, method=method, rule=rule, steps=steps, negative="")


def save_student(
    session: Session, folder: Path, manifest: dict[str, Any], metadata: dict[str, Any]
) -> Path:
    """Write the averaged student and its manifest in place of the folder; metadata: of the run."""
    distilled, pipeline = session.trainable, session.pipeline
    manifest = {**metadata, **manifest}
    with write_folder(folder) as temporary, distilled.ema.in_place():
        if distilled.lora is not None:
            save_lora(distilled.lora, pipeline.network_name, temporary, manifest)
        else:
            student, dtype = distilled.student, pipeline.network.dtype
            if dtype != student.dtype:
                student = copy.deepcopy(student).to(dtype)
            place, own = pipeline.network_name, manifest["trajectory"] == "own"
            save_student_pipeline(pipeline.pipe, place, student, temporary, own)
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        write_file(temporary / MANIFEST, text.encode())
    return folder
