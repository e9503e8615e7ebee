"""File names of images: numbers and keys by default, else a template; user text only as a slug.

    {index} {key} {seed} {slug} {sampler} {guidance} {axis:NAME}

Values become `[a-z0-9_-]`; templates are substituted here, never by `str.format`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from sampler import registry
from sampler.core.errors import UsageError
from sampler.runs.jobs import Job, JobSettings

FIELDS = ("index", "key", "seed", "slug", "sampler", "guidance", "axis:NAME")
MAX_NAME = 80  # bytes, without the ending
FOLDER_OF = 1000  # images per sub-folder, in runs of more than LARGE
LARGE = 10_000
_FIELD = re.compile(r"\{([^{}]*)\}")
_LITERAL = re.compile(r"[A-Za-z0-9_.-]*$")


def slug(text: str, limit: int = 40) -> str:
    """Reduce text to `[a-z0-9_-]`, at most `limit` characters; "x" if nothing is left."""
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9_]+", "-", plain)[:limit].strip("-") or "x"


def check_template(template: str) -> None:
    """Raise UsageError for unknown fields, other characters, and names that are not unique."""
    literal = _FIELD.sub("", template)
    if not _LITERAL.match(literal) or template.startswith((".", "-")) or ".." in literal:
        raise UsageError(
            f"--name-template {template!r:.80}: outside of the fields only letters, digits, "
            "'_', '-' and '.' are allowed, and no '..'.",
        )
    found = [match[1] for match in _FIELD.finditer(template)]
    for name in found:
        if name not in FIELDS and not re.fullmatch(r"axis:[A-Za-z0-9_./ -]{1,60}", name):
            raise UsageError(
                f"--name-template: unknown field {{{name:.40}}}{registry.suggestion(name, FIELDS)}."
            )
    if not {"index", "key"} & set(found):
        raise UsageError("--name-template needs {index} or {key}, so that names differ.")


def image_name(
    job: Job,
    settings: JobSettings,
    total: int,
    template: str | None = None,
    suffix: str = ".png",
) -> str:
    """Path such as `images/000012-3f9a1c20d4.png` in the run folder, with forward slashes."""
    stem = f"{job.index:06d}-{job.key[:10]}"
    if template:
        stem = _FIELD.sub(lambda match: _value(match[1], job, settings), template)
        if len(stem) > MAX_NAME:
            stem = f"{stem[: MAX_NAME - 11]}-{job.key[:10]}"
    folder = f"images/{job.index // FOLDER_OF:04d}" if total > LARGE else "images"
    return f"{folder}/{stem}{suffix}"


def _value(name: str, job: Job, settings: JobSettings) -> str:
    values: Mapping[str, str] = {
        "index": f"{job.index:06d}",
        "key": job.key[:10],
        "seed": str(job.seed),
        "slug": job.prompt,
        "sampler": str(settings.sampler["name"]),
        "guidance": str(settings.guidance["name"]),
    }
    text = values[name] if name in values else str(job.axes.get(name.removeprefix("axis:"), ""))
    return slug(text)
