"""The folder of a distilled student, read without loading it. Imports no torch.

manifest.json   kind, form, base, f, baked_guidance, timesteps, trajectory, prediction
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sampler.bundled import FOLDER
from sampler.core.errors import ModelError

MANIFEST = "manifest.json"
FORMAT = 1
FORMS = ("full", "lora", "difference")
TRAJECTORIES = ("renoised", "own")
WEIGHTS = "student.safetensors"  # of the form "difference"
BUNDLED = FOLDER / "student"


def student_folder(source: str | Path) -> Path:
    """The student's folder in a folder or a run folder. SamplerError (6) without one."""
    path = Path(source).expanduser()
    for folder in (path, path / "student"):
        if (folder / MANIFEST).is_file():
            return folder
    raise ModelError(
        f"{source} has no student: {MANIFEST} is neither there nor in student/; make one with "
        "`sampler finetune --trainer f_distill`.",
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a student's folder. SamplerError (6) for an invalid one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["kind"] == "student" and manifest["format"] == FORMAT
        known = known and manifest["form"] in FORMS and bool(manifest["timesteps"])
        known = known and all(isinstance(t, (int, float)) for t in manifest["timesteps"])
        # those written before there was a choice have none
        known = known and manifest.setdefault("trajectory", "renoised") in TRAJECTORIES
        known = known and isinstance(manifest["base"], str)
        known = known and isinstance(manifest["baked_guidance"]["name"], str)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ModelError(f"{folder / MANIFEST} is not the manifest of a student.")
    return manifest


def student_digest(source: str | Path) -> str:
    """A hash of the student's weights and manifest."""
    folder, digest = student_folder(source), hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name == MANIFEST or path.suffix == ".safetensors":
            digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def student_run(source: str | Path) -> dict[str, Any]:
    """Return a student's default settings: a tree of configuration keys."""
    manifest = read_manifest(student_folder(source))
    return {
        "sampler": {"name": "consistency"},
        "guidance": {"name": "student"},
        "run": {"steps": len(manifest["timesteps"])},
    }
