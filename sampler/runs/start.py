"""Start of a run: plan it, then write a new run folder or resume the one of the same plan."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from sampler.core.errors import RunFolderError
from sampler.runs.folder import FORMAT, JOBS, PLAN, RUN, OutputOptions, RunFolder, key_in
from sampler.runs.jobs import Job, Model, model_differences
from sampler.runs.metadata import library_versions
from sampler.runs.plan import Plan, PlannedBatch
from sampler.runs.planner import Planner
from sampler.runs.readers import RawLine
from sampler.runs.store import Store

SPOOL_BYTES = 64 * 2**20  # of jobs.jsonl in memory, before it goes to a temporary file


@dataclass(frozen=True)
class PlannedRun:
    """A plan and its jobs, not bound to a folder yet.

    config: sections of the configuration to record; jobs: content of jobs.jsonl; first, last: jobs.
    """

    plan: Plan
    model: Model
    output: OutputOptions
    config: Mapping[str, Any]
    jobs: IO[bytes]
    first: Job
    last: Job


def plan_run(
    planner: Planner,
    lines: Iterable[RawLine],
    output: OutputOptions | None = None,
    config: Mapping[str, Any] | None = None,
) -> PlannedRun:
    """Read the lines once and plan them. Raises UsageError as `Planner.jobs` does."""
    spool: IO[bytes] = tempfile.SpooledTemporaryFile(SPOOL_BYTES)
    jobs = planner.jobs(lines)
    first = last = next(jobs)
    spool.write(first.encode())
    for last in jobs:
        spool.write(last.encode())
    output = output or OutputOptions()
    return PlannedRun(planner.plan, planner.model, output, config or {}, spool, first, last)


def start(store: Store, planned: PlannedRun) -> RunFolder:
    """Write the plan to a new run folder, or open the folder that has it.

    Raises RunFolderError, naming the differences, if the folder has another plan.
    """
    planned.jobs.seek(0)
    if store.read(RUN) is not None:
        run = RunFolder(store)
        _compare(run, planned)
        return run
    with store.new(JOBS) as stream:
        shutil.copyfileobj(planned.jobs, stream, 2**20)
    write_plan(store, planned, planned.plan, planned.plan.batches())
    return RunFolder(store)


def write_plan(
    store: Store, planned: PlannedRun, plan: Plan, batches: Sequence[PlannedBatch]
) -> None:
    """Write plan.json and then run.json, of a plan whose jobs.jsonl is there."""
    body = {
        "v": FORMAT,
        "hash": plan.hash,
        "lines": plan.lines,
        "jobs": plan.jobs,
        "batch_size": plan.batch_size,
        "groups": [group.plain() for group in plan.groups],
        "duplicates": plan.duplicates,
        "cells": plan.cells,
        "batches": [[batch.group, _ranges(batch.jobs)] for batch in batches],
    }
    store.put(PLAN, _dump(body))
    facts = {
        "v": FORMAT,
        "plan": plan.hash,
        "model": asdict(planned.model),
        "output": asdict(planned.output),
        "config": planned.config,
        "versions": library_versions(),
        "origin": {"cwd": os.getcwd(), "folder": _absolute(store.where)},
    }
    store.put(RUN, _dump(facts, indent=1))


def _compare(run: RunFolder, planned: PlannedRun) -> None:
    """Raise RunFolderError if the new plan is not the stored one."""
    different: list[str] = []
    for index, line in enumerate(planned.jobs):
        if index >= run.total or run.key(index) != key_in(line):
            job = _job_differences(run, index, Job.parse(line), planned.plan)
            different += job or model_differences(run.model.identity, planned.model.identity)
            break
    if asdict(planned.output) != asdict(run.output):
        different.append("output")
    if planned.plan.hash == run.hash and not different:
        return
    if planned.plan.jobs != run.total:
        different.append(f"images ({run.total} in the folder, {planned.plan.jobs} now)")
    what = ", ".join(dict.fromkeys(different)) or "batch_size"
    raise RunFolderError(
        f"{run.store.where} belongs to another plan; different: {what}. "
        "Use --extend to add to it, another folder (-o), or --new for a new one.",
    )


def _job_differences(run: RunFolder, index: int, new: Job, plan: Plan) -> list[str]:
    """Names of the fields in which the first differing jobs differ."""
    if index >= run.total:
        return []
    old = run.job(index)
    before, after = asdict(run.groups[old.group]), asdict(plan.groups[new.group])
    own = ("prompt", "negative_prompt", "seed", "replica")
    found = [f"{n} of image {index}" for n in own if getattr(old, n) != getattr(new, n)]
    found += [f"{n} ({_short(before[n])} in the folder, {_short(after[n])} now)"
              for n in before if before[n] != after[n]]  # fmt: skip
    return found


def _short(value: Any) -> str:
    text = value.get("name", "?") if isinstance(value, dict) else value
    return str(text)[:40]


def _absolute(where: str) -> str:
    return where if "://" in where else os.path.abspath(where)


def _ranges(indices: Iterable[int]) -> list[int]:
    """Encode increasing numbers as [start, stop, start, stop, ...]."""
    flat: list[int] = []
    for index in indices:
        if flat and flat[-1] == index:
            flat[-1] += 1
        else:
            flat += [index, index + 1]
    return flat


def _dump(body: dict[str, Any], indent: int | None = None) -> bytes:
    return (json.dumps(body, ensure_ascii=False, allow_nan=False, indent=indent) + "\n").encode()
