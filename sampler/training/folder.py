"""config.json: what a run folder was started with; another run is not mixed into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sampler.core.binding import fingerprint
from sampler.core.durable import write_file
from sampler.errors import RunFolderError
from sampler.registry import spec_of
from sampler.rewards.base import name_of
from sampler.training.base import TrainerBase
from sampler.training.session import Session
from sampler.training.settings import Settings, changed


def run_record(
    session: Session, trainer: TrainerBase, prompts: list[str], settings: Settings
) -> dict[str, Any]:
    """What was asked for, as plain data."""
    record = {
        "format": 1,
        "model": fingerprint(session.engine.pipeline.network),
        "trainer": spec_of(trainer),
        "reward": spec_of(session.reward),
        "prompts": prompts,
        "fit": settings.record(),
    }
    return json.loads(json.dumps(record, default=name_of))


def claim(out: Path, config: dict[str, Any]) -> None:
    """Writes config.json, or compares with the one there. Raises SamplerError (4)."""
    path = out / "config.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        if different := changed(before, config):
            raise RunFolderError(
                f"{out} holds another run; it differs in {', '.join(different[:5])}. "
                "Choose another folder, or the settings of that run to go on with it.",
            )
    write_file(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
