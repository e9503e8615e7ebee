"""Killed at any moment, a run goes on bit-equal; two processes have the gradient of one."""

import math
import os
import random

import pytest
import torch

import sampler.core.durable as durable
from sampler.training import checkpoint
from sampler.training.journal import Journal
from sampler.workers.prompt_file import ConditionFile
from tests.processes import in_ranks
from tests.training import faults, world
from tests.training.test_fit import flat_moment

UPDATES = 4
KILLS = int(os.environ.get("FINETUNE_KILLS", "10"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    faults.main(str(out), UPDATES)
    return out


def in_child(out, arm, run=lambda out: faults.main(out, UPDATES)):
    """The exit status of a forked process that runs, or goes on with, `out`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm()
            run(str(out))
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def die_at(count, told=lambda: None):
    """Kill the process at its count-th write: a durable one, of the log, or of the text cache."""
    left = [count]

    def before(call):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            told()
            if left[0] <= 0:
                os.kill(os.getpid(), 9)
            return call(*args, **kwargs)

        return wrapped

    for name in ("open", "write", "fsync", "replace"):
        setattr(durable.os, name, before(getattr(os, name)))
    durable.shutil.rmtree = before(durable.shutil.rmtree)
    Journal.add, ConditionFile.add = before(Journal.add), before(ConditionFile.add)


def test_a_run_that_is_killed_goes_on_bit_equal(tmp_path, reference):
    """At random durable operations, checkpoint writing included; every life starts over."""
    generator, kills, run = random.Random(0), 0, 0
    while kills < KILLS:
        out, run = tmp_path / str(run), run + 1
        while True:
            place = generator.randint(5, 60)  # drawn here: a child's draws are the same each time
            status = in_child(out, lambda place=place: die_at(place))
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9
            kills += 1
        assert world.curve(out) == world.curve(reference)
        assert world.weights(out) == world.weights(reference)
        left = [p.name for p in (out / "checkpoints").iterdir()]
        assert left == [f"{UPDATES:06d}"]


@pytest.mark.parametrize("name", faults.RUNS)
def test_every_trainer_goes_on_bit_equal_where_it_is_killed(tmp_path, name):
    """With old and averaged weights, moving windows, votes, and a file of conditions.

    A run is killed at a write of chance, and again at one of the first of those that are left.
    """
    whole, cut, writes = tmp_path / "whole", tmp_path / "cut", tmp_path / "writes"

    def run(out):
        faults.run(out, 2, name)

    def counting():
        kept = writes.open("ab", buffering=0)
        die_at(math.inf, lambda: kept.write(b"."))

    assert in_child(whole, counting, run) == 0
    total, generator = writes.stat().st_size, random.Random(name)
    for places in ((total // 3, 2 * total // 3), (5, total // 3)):
        place = generator.randint(*places)
        status = in_child(cut, lambda place=place: die_at(place), run)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9
    assert in_child(cut, lambda: None, run) == 0
    assert world.curve(cut) == world.curve(whole)
    assert world.weights(cut) == world.weights(whole)
    assert [p.name for p in (cut / "checkpoints").iterdir()] == ["000002"]
    assert not [*cut.glob("text_cache/*")]


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Over gloo; the rows are cut into micro-batches of one in both cases."""
    outs = {
        trainer: tmp_path / trainer
        for trainer in ("alignprop", "ddpo", "nft", "awm", "grpo", "dpo", "srpo")
    }

    def every_trainer():
        for trainer, out in outs.items():
            faults.main(str(out), 1, trainer, micro=1)

    assert in_ranks(every_trainer) == [0, 0]
    for trainer, two in outs.items():
        one = tmp_path / f"one-{trainer}"
        faults.main(str(one), 1, trainer, micro=1)
        ours, theirs = flat_moment(two), flat_moment(one)
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm() > 0
        a, b = world.curve(two)[0], world.curve(one)[0]
        assert a["reward"] == pytest.approx(b["reward"], rel=1e-6) and a["nfe"] == b["nfe"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)


def test_the_reference_is_not_trivial(reference):
    found = checkpoint.load_newest(reference / "checkpoints")
    assert found is not None and found.update == UPDATES
    assert len({round(r["loss"], 9) for r in world.curve(reference)}) == UPDATES
    assert any(torch.count_nonzero(v) for k, v in found.adapter.items() if "lora_B" in k)
