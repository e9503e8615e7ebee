"""Kills, torn writes and corruption of run folders, and of a conventional loop for comparison."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sampler.runs.folder import RunFolder
from sampler.runs.store import open_store
from sampler.runs.verify import findings
from sampler.workers.work import WorkOptions
from tests.runs.stub import engine, is_intact, make, pictures, prompts
from tests.runs.test_kill import count_points, in_child, run_until_call

Row = tuple[str, Any, str]
TABLE = prompts(10)
RUNS, KILLS = 40, 200


def kills(folder: Path) -> Iterator[Row]:
    """Random SIGKILLs of a forked run, until at least RUNS runs and KILLS kills."""
    make(folder / "whole", TABLE)
    wanted = pictures(folder / "whole")
    rng, killed, runs = random.Random(1), 0, 0
    wrong: Counter[str] = Counter()
    span = _duration(lambda: _paused(folder / "timed"))
    while runs < RUNS or killed < KILLS:
        where = folder / f"run{runs}"
        killed += _until_finished(lambda where=where: _paused(where), rng, span)
        wrong += _differences(wanted, pictures(where))
        wrong["recorded twice or not"] += bool(RunFolder(open_store(where)).missing(check="hash"))
        runs += 1
    yield "runs completed", runs, f">= {RUNS}"
    yield "kills", killed, f">= {KILLS}"
    for kind in ("lost", "cut", "changed", "extra", "recorded twice or not"):
        yield f"images {kind}", wrong[kind], "0"


def points(folder: Path) -> Iterator[Row]:
    """Kill before every call that changes the disk, and in the middle of every write."""
    make(folder / "whole", TABLE)
    wanted = pictures(folder / "whole")
    total = count_points(folder / "count")
    wrong: Counter[str] = Counter()
    killed = 0
    for number in range(1, total + 1):
        for torn in (False, True):
            where = folder / f"{number}-{torn}"
            killed += run_until_call(where, number, torn) == signal.SIGKILL
            make(where, TABLE)
            wrong += _differences(wanted, pictures(where))
    yield "calls that change the disk", total, ""
    yield "kills at them, whole and torn", killed, ""
    for kind in ("lost", "cut", "changed", "extra"):
        yield f"images {kind}", wrong[kind], "0"


def naive(folder: Path) -> Iterator[Row]:
    """Kill a conventional loop: skip existing files, else save under the final name."""
    make(folder / "whole", TABLE)
    wanted = pictures(folder / "whole")
    rng, killed, runs = random.Random(1), 0, 0
    wrong: Counter[str] = Counter()
    (folder / "timed" / "images").mkdir(parents=True)
    span = _duration(lambda: _naive_loop(folder / "timed", wanted))
    while runs < RUNS or killed < KILLS:
        where = folder / f"run{runs}"
        (where / "images").mkdir(parents=True)
        killed += _until_finished(lambda where=where: _naive_loop(where, wanted), rng, span)
        wrong += _differences(wanted, pictures(where))
        runs += 1
    yield "runs completed", runs, f">= {RUNS}"
    yield "kills", killed, f">= {KILLS}"
    for kind in ("lost", "cut", "changed", "extra"):
        yield f"images {kind}", wrong[kind], ""


def corruptions(folder: Path) -> Iterator[Row]:
    """Damage finished images at random; all must be found, and only those regenerated."""
    where, rng = folder / "run", random.Random(2)
    make(where, TABLE)
    whole = pictures(where)
    found = repaired = alarms = 0
    for _ in range(200):
        name = rng.choice(sorted(whole))
        _damage(where / "images" / name, rng)
        told = [finding.what for finding in findings(RunFolder(open_store(where)))]
        found += f"images/{name}" in told
        alarms += len(told) - 1
        _, tally = make(where, TABLE, work_options=WorkOptions(check="hash"))
        repaired += tally.done == 1 and pictures(where) == whole
    yield "corruptions", 200, "200"
    yield "found", found, "200"
    yield "false alarms", alarms, "0"
    yield "exactly that repaired", repaired, "200"


def _paused(where: Path) -> None:
    make(where, TABLE, engine(pause=0.003))


def _naive_loop(where: Path, wanted: dict[str, bytes]) -> None:
    """Simulate the time of a network and of an encoder that writes incrementally."""
    for name, data in wanted.items():
        path = where / "images" / name
        if path.exists():
            continue
        time.sleep(0.009)
        with open(path, "wb", buffering=0) as stream:
            for start in range(0, len(data), 256):
                stream.write(data[start : start + 256])
                time.sleep(0.0005)


def _duration(action: Callable[[], Any]) -> float:
    """Measure the seconds that an action takes in an undisturbed fork."""
    began = time.perf_counter()
    os.waitpid(in_child(action), 0)
    return time.perf_counter() - began


def _until_finished(action: Callable[[], Any], rng: random.Random, span: float) -> int:
    """Fork the action and kill it at random times up to its duration, until one completes;
    how many kills."""
    killed = 0
    while True:
        pid = in_child(action)
        time.sleep(rng.uniform(0.0, 0.8 * span))
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == 0:
            return killed
        killed += 1


def _differences(wanted: dict[str, bytes], found: dict[str, bytes]) -> Counter[str]:
    wrong = Counter(lost=len(wanted.keys() - found.keys()), extra=len(found.keys() - wanted.keys()))
    for name in wanted.keys() & found.keys():
        if found[name] != wanted[name]:
            wrong["changed" if is_intact(found[name]) else "cut"] += 1
    return wrong


def _damage(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = rng.randrange(3)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
