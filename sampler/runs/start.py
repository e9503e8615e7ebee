"""The start of a run: a new folder is planned; one that is there goes on, if it is of this plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from sampler.errors import RunFolderError
from sampler.runs.folder import FORMAT, JOBS, PLAN, RUN, Facts, RunFolder
from sampler.runs.jobs import Job
from sampler.runs.metadata import library_versions
from sampler.runs.planner import Planner
from sampler.runs.store import Store
from sampler.runs.tables import Line


def start(
    store: Store, planner: Planner, rows: Iterable[Line], text: bool, facts: Facts
) -> RunFolder:
    """The run of these rows in this folder: planned, or found there to be gone on with.

    Raises SamplerError (4), naming what differs, where the folder holds another plan.
    """
    jobs = planner.jobs(rows, text)
    if store.read(RUN) is not None:
        run = RunFolder(store)
        _compare(run, jobs, planner, facts)
        return run
    with store.new(JOBS) as stream:
        for job in jobs:
            stream.write(job.line().encode())
    plan = planner.plan
    body = {
        "v": FORMAT,
        "hash": plan.hash,
        "rows": plan.rows,
        "jobs": plan.jobs,
        "batch_size": plan.batch_size,
        "groups": [asdict(group) for group in plan.groups],
        "duplicates": plan.duplicates,
        "batches": [[batch.group, _ranges(batch.jobs)] for batch in plan.batches()],
    }
    store.put(PLAN, _dump(body))
    run = {
        "v": FORMAT,
        "plan": plan.hash,
        "model": asdict(facts.model),
        "output": asdict(facts.output),
        "config": facts.config,
        "versions": library_versions(),
    }
    store.put(RUN, _dump(run, indent=1))
    return RunFolder(store)


def _compare(run: RunFolder, jobs: Iterator[Job], planner: Planner, facts: Facts) -> None:
    """Raises SamplerError (4) where the new plan is not the stored one."""
    different: list[str] = []
    old = run.jobs()
    for new in jobs:
        known = next(old, None)
        if known is None or known.key != new.key:
            different += _job_differences(run, known, new, planner)
            break
    for _ in jobs:
        pass
    if asdict(facts.output) != asdict(run.output):
        different.append("output")
    if planner.plan.hash == run.hash and not different:
        return
    if planner.plan.jobs != run.total:
        different.append(f"images ({run.total} there, {planner.plan.jobs} asked for)")
    what = ", ".join(dict.fromkeys(different)) or "batch_size"
    raise RunFolderError(
        f"{run.store.where} belongs to another plan; different: {what}. "
        "Use another folder (-o), or --new for a new one.",
    )


def _job_differences(run: RunFolder, old: Job | None, new: Job, planner: Planner) -> list[str]:
    """The keys in which the first differing jobs differ."""
    if old is None:
        return []
    before, after = asdict(run.groups[old.group]), asdict(planner.plan.groups[new.group])
    own = ("prompt", "negative_prompt", "seed", "replica")
    found = [f"{n} of image {new.index}" for n in own if getattr(old, n) != getattr(new, n)]
    found += [f"{n} ({_short(before[n])} there, {_short(after[n])} asked for)"
              for n in before if before[n] != after[n]]  # fmt: skip
    return found or ["model"]


def _short(value: Any) -> str:
    text = value.get("name", "?") if isinstance(value, dict) else value
    return str(text)[:40]


def _ranges(indices: Iterable[int]) -> list[int]:
    """[start, stop, start, stop, ...] of increasing numbers."""
    flat: list[int] = []
    for index in indices:
        if flat and flat[-1] == index:
            flat[-1] += 1
        else:
            flat += [index, index + 1]
    return flat


def _dump(body: dict[str, Any], indent: int | None = None) -> bytes:
    return (json.dumps(body, ensure_ascii=False, allow_nan=False, indent=indent) + "\n").encode()
