"""Check of a run: every file against its journal, every job against its key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sampler.runs.encodings import SUFFIXES
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import key_of, record_of
from sampler.runs.media import MP4, WAV


@dataclass(frozen=True)
class Finding:
    """One inconsistency. kind: missing, size, content, job, unknown, journal; what: its file."""

    kind: str
    what: str
    problem: str


def findings(run: RunFolder) -> Iterator[Finding]:
    """Yield every inconsistency; images not generated yet are not errors."""
    results = run.results()
    if results.bad:
        yield Finding("journal", "journal", f"{results.bad} lines cannot be read (ignored)")
    sizes = run.store.sizes()
    known: set[str] = set()
    for index in range(run.total):
        entry = results.entries.get(run.key(index))
        yield from _job(run, index)
        if entry is None or entry["status"] != "ok":
            continue
        name = entry["file"]
        known.add(name)
        if name not in sizes:
            yield Finding("missing", name, "the file is missing")
        elif sizes[name] != entry["bytes"]:
            yield Finding("size", name, f"{sizes[name]} bytes, not {entry['bytes']}")
        elif run.digest(name) != entry["sha256"]:
            yield Finding("content", name, "the content is not what was written")
    for name in sorted(sizes.keys() - known):
        if name.endswith((*SUFFIXES.values(), MP4, WAV)):
            yield Finding("unknown", name, "no record in the journal")


def _job(run: RunFolder, index: int) -> Iterator[Finding]:
    name = f"jobs.jsonl:{index + 1}"
    try:
        job = run.job(index)
        fits = key_of(record_of(job, run.groups[job.group], run.model)) == job.key
        if not fits or job.index != index:
            yield Finding("job", name, "the job does not fit its key")
    except (ValueError, TypeError, IndexError, KeyError):
        yield Finding("job", name, "the line cannot be read")
