"""Killed at any point, a run resumes to the same files: nothing lost, twice, cut or changed."""

import json
import os
import random
import signal
import time
from collections import Counter

import pytest

from tests.runs.stub import engine, is_intact, make, pictures, prompts

TABLE = prompts(10)
POINTS = ("open", "write", "fsync", "replace", "close", "makedirs", "ftruncate")


def in_child(action):
    """Runs `action` in a fork; (exit status, whether it ended by itself)."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def state_of(where):
    """Contents of a finished run: images, and how often each key is recorded as ok."""
    lines = (where / "journal.jsonl").read_bytes().split(b"\n")
    keys = Counter()
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        keys[entry.get("key")] += entry.get("status") == "ok"
    return pictures(where), keys


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The images of the run that nobody disturbs."""
    where = tmp_path_factory.mktemp("whole")
    make(where, TABLE, engine())
    images = pictures(where)
    assert len(images) == len(TABLE) and all(map(is_intact, images.values()))
    return images


def count_points(where):
    """Count the system calls of POINTS in a run."""
    calls = []
    child_report = where.parent / "calls"

    def action():
        for name in POINTS:
            real = getattr(os, name)
            setattr(os, name, lambda *a, real=real, **k: (calls.append(1), real(*a, **k))[1])
        make(where, TABLE, engine())
        child_report.write_text(str(len(calls)))

    assert os.waitpid(in_child(action), 0)[1] == 0
    return int(child_report.read_text())


def run_until_call(where, number, torn):
    """A run that dies at its call `number`; with `torn`, half of a write reaches the disk."""

    def action():
        left = [number]

        def wrapped(name, real):
            def call(*arguments, **keywords):
                left[0] -= 1
                if left[0] == 0:
                    if torn and name == "write":
                        data = bytes(arguments[1])
                        real(arguments[0], data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **keywords)

            return call

        for name in POINTS:
            setattr(os, name, wrapped(name, getattr(os, name)))
        make(where, TABLE, engine())

    return os.waitpid(in_child(action), 0)[1]


def test_every_write_point(tmp_path, whole):
    """Exhaustively: a kill before every single call that changes the disk, and torn writes."""
    total = count_points(tmp_path / "count")
    assert total > 60
    step = max(1, total // int(os.environ.get("SAMPLER_KILL_POINTS", 45)))
    for number in range(1, total + 1, step):
        for torn in (False, True):
            where = tmp_path / f"{number}-{torn}"
            assert run_until_call(where, number, torn) in (signal.SIGKILL, 0)
            make(where, TABLE, engine())
            images, recorded = state_of(where)
            assert images == whole, f"call {number}"
            assert all(recorded[key] for key in recorded if key)
            assert not list((where / "images").glob(".tmp*"))


def test_random_kills(tmp_path, whole):
    """Killed again and again at random times until it is finished.

    It gets more time after every kill, so that a busy machine comes to an end too.
    """
    kills = 0
    rng = random.Random(6)
    for attempt in range(6):
        where, longest = tmp_path / str(attempt), 0.02
        while True:
            pid = in_child(lambda where=where: make(where, TABLE, engine(pause=0.004)))
            time.sleep(rng.uniform(0.0, longest))
            os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] == 0:
                break
            kills, longest = kills + 1, 1.3 * longest
        assert state_of(where)[0] == whole
    assert kills >= 10


def test_a_naive_loop_would_fail_here(tmp_path, whole):
    """The harness sees what it looks for: save to the final name, skip what exists."""
    name, data = next(iter(whole.items()))
    broken = tmp_path / name
    broken.write_bytes(data[: len(data) // 2])
    assert not is_intact(broken.read_bytes())
