"""Results of a run as plain records, for tables and galleries."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from sampler.runs.cells import STRATEGIES
from sampler.runs.exported import AXIS, strategy_columns
from sampler.runs.folder import RunFolder
from sampler.runs.metadata import scale_of


def records(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Yield one record per job, in order; status "open" if there is no result yet."""
    entries = run.results().entries
    sharing: dict[int, list[int]] = defaultdict(list)
    for line, index in run.duplicates:
        sharing[index].append(line)
    for job in run.jobs():
        settings = run.groups[job.group]
        entry = entries.get(job.key, {})
        error = entry.get("error") or {}
        yield {
            "index": job.index,
            "key": job.key,
            "status": entry.get("status", "open"),
            "file": entry.get("file"),
            "lines": [job.line, *sharing[job.index]],
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "seed": job.seed,
            "steps": settings.steps,
            "width": entry.get("w", settings.width),
            "height": entry.get("h", settings.height),
            "sampler": dict(settings.sampler),
            "guidance": dict(settings.guidance),
            **({} if settings.grid is None else {"grid": settings.grid}),
            "scale": scale_of(settings.guidance),
            "nfe": entry.get("nfe"),
            "ms": entry.get("ms"),
            "warnings": entry.get("warnings", []),
            "error": f"{error['code']}: {error['message']}" if error else None,
            "tag": job.tag,
            "meta": dict(job.meta),
            "axes": dict(job.axes),
        }


def images(run: RunFolder) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield (record, file content) of finished images; missing files are left out."""
    for record in records(run):
        if record["status"] == "ok" and (data := run.store.read(record["file"])) is not None:
            yield record, data


def cells(run: RunFolder) -> list[tuple[dict[str, Any], bytes]]:
    """Finished images by line and place; one that fills several cells of a sweep is in each."""
    data_of = {record["index"]: data for record, data in images(run)}
    shared = {(cell.line, cell.place): cell for cell in run.cells}
    placed: dict[tuple[int, int], dict[str, Any]] = {}
    by_job: dict[int, dict[str, Any]] = {}
    next_place: dict[int, int] = defaultdict(int)
    for record in records(run):
        line = record["lines"][0]
        while (line, next_place[line]) in shared:
            next_place[line] += 1
        placed[line, next_place[line]] = by_job[record["index"]] = record
        next_place[line] += 1
    for place, cell in shared.items():
        placed[place] = {**by_job[cell.job], "axes": dict(cell.axes)}
    ordered = [placed[place] for place in sorted(placed)]
    return [(r, data_of[r["index"]]) for r in ordered if r["index"] in data_of]


def counts(run: RunFolder) -> dict[str, int]:
    """Number of images by status: ok, error, skipped, open."""
    entries = run.results().entries
    found = Counter(
        entries.get(run.key(index), {}).get("status", "open") for index in range(run.total)
    )
    return {status: found[status] for status in ("ok", "error", "skipped", "open")}


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a record for a table: fields of strategies, meta and axes as columns."""
    cells = {key: value for key, value in record.items() if key not in ("meta", "axes")}
    cells["lines"] = ";".join(map(str, record["lines"]))
    cells["warnings"] = "; ".join(record["warnings"])
    for kind in STRATEGIES:
        cells |= strategy_columns(kind, record[kind])
    cells |= {name: _plain(value) for name, value in record["meta"].items()}
    return cells | {f"{AXIS}{name}": _plain(value) for name, value in record["axes"].items()}


def shown(value: Any) -> str:
    """Format a value for people, in one line."""
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", " ")


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
