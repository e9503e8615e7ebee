"""Metadata in images: the record as JSON, and the text form that web UIs read.

No paths, users, hosts, environment or times: equal jobs give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from sampler.core.errors import UsageError
from sampler.runs.encodings import PARAMETERS, decode
from sampler.runs.encodings import RECORD as CHUNK
from sampler.runs.foreign import Foreign, read_foreign
from sampler.runs.jobs import Job, JobSettings, Model, canonical, key_of, record_of

Metadata = Literal["full", "basic", "none"]
MAX_RECORD = 256 * 1024
SELECTION = "meta_best_of"  # the drafts that an image was chosen from (sampler.workers.best_of)
LIBRARIES = ("diffusion-sampler", "torch", "diffusers", "transformers")


def texts(job: Job, settings: JobSettings, model: Model, size: tuple[int, int], how: Metadata,
          libraries: Mapping[str, str], dtype: str) -> dict[str, str]:  # fmt: skip
    """Text chunks of an image of this (height, width). dtype: that of the computation."""
    if how == "none":
        return {}
    if how == "basic":
        names = {"sampler": settings.sampler["name"], "guidance": settings.guidance["name"]}
        return {CHUNK: canonical({"key": job.key, "seed": job.seed, **names})}
    body = {"record": record_of(job, settings, model), "libraries": dict(libraries)}
    if SELECTION in job.meta:
        body["best_of"] = job.meta[SELECTION]
    record = canonical({"key": job.key, **body, "dtype": dtype})
    if len(record.encode()) > MAX_RECORD:
        record = canonical({"key": job.key, "record": "see the run's journal"})
    return {CHUNK: record, PARAMETERS: parameters(job, settings, model, size)}


def parameters(job: Job, settings: JobSettings, model: Model, size: tuple[int, int]) -> str:
    """Text in the common web-UI form: prompt, negative prompt, one line of settings."""
    guidance = settings.guidance
    facts = {
        "Steps": settings.steps,
        "Sampler": settings.sampler["name"],
        "CFG scale": scale_of(guidance),
        "Seed": job.seed,
        "Size": f"{size[1]}x{size[0]}" if all(size) else None,
        "Model hash": model.fingerprint.partition(":")[2][:10],
        "Model": model.label,
        "Guidance": guidance["name"],
        "Version": f"diffusion-sampler {library_versions()['diffusion-sampler']}",
    }
    given = {key: value for key, value in facts.items() if value not in (None, "")}
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in given.items())
    negative = [f"Negative prompt: {job.negative_prompt}"] if job.negative_prompt else []
    return "\n".join([job.prompt, *negative, line])


def _quoted(value: Any) -> Any:
    """The value, as a JSON string if it holds one of the separators, as web UIs write it."""
    quotes = isinstance(value, str) and any(mark in value for mark in ",:\n")
    return json.dumps(value, ensure_ascii=False) if quotes else value


def scale_of(guidance: Mapping[str, Any]) -> Any:
    """Guidance scale of a rule or of the rule inside it; None if none has one."""
    if "scale" in guidance:
        return guidance["scale"]
    inner = [scale_of(value) for value in guidance.values() if isinstance(value, Mapping)]
    return inner[0] if inner else None


def read_metadata(data: bytes) -> dict[str, Any]:
    """Read what an image holds of its generation: with `full` metadata the record, checked.

    Returns {"key", "record", "libraries"}, or {"key", "seed", "sampler", "guidance"} of `basic`.
    Raises UsageError for a file that is not an image, holds nothing, or is damaged.
    """
    _, found = decode(data)
    if CHUNK not in found:
        raise UsageError("The image holds no record of its generation.")
    try:
        body = json.loads(found[CHUNK])
        record = body.get("record")
        is_readable = isinstance(body["key"], str)
        matches = not isinstance(record, dict) or key_of(record) == body["key"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_readable = matches = False
    if not is_readable:
        raise UsageError("The image's record cannot be read.")
    if not matches:
        raise UsageError("The image's record is damaged: it does not match its key.")
    return body


def foreign_metadata(data: bytes) -> Foreign | None:
    """Settings of an image of another program; None for ours, and for images that hold nothing.

    Raises UsageError for a file that is not an image, and for settings that cannot be read.
    """
    _, found = decode(data)
    return None if CHUNK in found else read_foreign(found)


def read_record(data: bytes) -> dict[str, Any]:
    """Read an image's metadata, which must include its record. Raises UsageError."""
    body = read_metadata(data)
    if not isinstance(body.get("record"), dict):
        raise UsageError(
            f"The image holds its key ({body['key'][:10]}) but not its record, which is in its run "
            "folder: name it as RUN#KEY."
        )
    return body


@cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries, without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
