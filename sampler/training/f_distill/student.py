"""The student of a run: evaluation and storage.

RUN/student/manifest.json    base, divergence, baked guidance, times, prediction
full:   an ordinary diffusers pipeline with the student as its network
lora:   pytorch_lora_weights.safetensors, for `load_lora_weights` on the base pipeline
difference:   student.safetensors, the network as int8 differences to its teacher
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
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
from sampler.training.f_distill.networks import Distilled, Form
from sampler.training.session import Session
from sampler.types import Level


def student_manifest(
    session: Session, form: Form, divergence: str, levels: Sequence[Level]
) -> dict[str, Any]:
    """Describe a student as plain data."""
    times = [level.t for level in levels]
    return {
        "kind": "student",
        "format": FORMAT,
        "base": session.trainable.base,
        "form": form,
        "f": divergence,
        "baked_guidance": registry.spec_of(session.rule),
        "baked_negative": session.negative,
        "timesteps": times,
        "steps": len(times),
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
            save_student_pipeline(pipeline.pipe, pipeline.network_name, student, temporary)
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        write_file(temporary / MANIFEST, text.encode())
    return folder
