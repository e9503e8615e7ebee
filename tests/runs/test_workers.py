"""Several workers: everything is made, nothing depends on how many there were or who died."""

import os
import signal
import threading
import time
from collections import Counter

import pytest

from sampler.core.errors import SamplerError
from sampler.runs.folder import RunFolder
from sampler.runs.location import RunLocation, location_for, open_locked, wait_for_plan
from sampler.runs.stop import StopFlag
from sampler.runs.store import LocalStore, open_store
from sampler.workers import claims
from sampler.workers.claims import Claims, remove_claims
from sampler.workers.execute import execute
from sampler.workers.work import WorkOptions
from tests.runs.stub import contents, engine, make, planned, prompts

TABLE = prompts(24)
LEASE = 0.8


def as_rank(where, rank, trouble=None, lease=LEASE, world=2, pause=0.01, group="g"):
    """Run one rank in this process."""
    location = RunLocation(str(where), rank, world, group)
    with open_locked(location) as store:
        run = planned(store, TABLE, 2) if rank == 0 else wait_for_plan(store)
        made = engine(pause=pause, trouble=trouble)
        return execute(run, lambda: made, location, WorkOptions(lease=lease), StopFlag())


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.exists()


def fork(action):
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    where = tmp_path_factory.mktemp("whole")
    make(where, TABLE, batch_size=2)
    return contents(where)


def recorded(where):
    results = Counter()
    for data in open_store(where).journals():
        results.update(
            line.split(b'"key": "')[1][:20] for line in data.splitlines() if b'"ok"' in line
        )
    return results


def test_two_ranks_share_the_work(tmp_path, whole):
    met = tmp_path / "met"
    met.mkdir()

    def meeting(rank):
        """Neither rank computes its third batch before the other one has come to its second."""

        def trouble(adapter, *_):
            step = len(adapter.batches)
            if step in (1, 4):  # three steps a batch
                (met / f"{rank} {step}").touch()
                wait_for(met / f"{1 - rank} {step}")

        return trouble

    run = tmp_path / "run"
    pids = [fork(lambda rank=rank: as_rank(run, rank, meeting(rank), 300.0)) for rank in (0, 1)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert contents(run) == whole
    assert set(recorded(run).values()) == {1}, "none twice"
    sizes = [len(path.read_bytes().splitlines()) for path in run.glob("journal*")]
    assert len(sizes) == 2 and min(sizes) >= 4 and not (run / ".claims").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_is_made_up_for(tmp_path, whole, victim):
    """Its first batch is recorded and its second one claimed when it is killed."""
    run, stuck = tmp_path / "run", tmp_path / "stuck"
    journal = run / f"journal{'-1' if victim else ''}.jsonl"

    def dying(adapter, *_):
        if len(adapter.batches) == 4:  # three steps a batch
            wait_for(journal)
            stuck.touch()
            time.sleep(300)

    def surviving(adapter, *_):
        if len(adapter.batches) == 1:
            wait_for(stuck)

    troubles = {victim: dying, 1 - victim: surviving}
    pids = {rank: fork(lambda rank=rank: as_rank(run, rank, troubles[rank])) for rank in (0, 1)}
    wait_for(stuck)
    os.kill(pids[victim], signal.SIGKILL)
    assert os.waitpid(pids[victim], 0)[1] == signal.SIGKILL
    assert os.waitpid(pids[1 - victim], 0)[1] == 0
    assert contents(run) == whole
    assert not RunFolder(open_store(run)).missing(check="hash")


def test_claims_hold_until_their_batches_are_recorded(tmp_path, monkeypatch):
    """A batch in the writer's queue is nobody else's to compute."""
    run, ended, kept = tmp_path / "run", threading.Event(), []
    real, commit = claims.claimed_batches, LocalStore.commit

    def to_the_end(*arguments):
        yield from real(*arguments)
        ended.set()

    def late(store, names, lines):
        if len(recorded(run)) == 22:  # the last batch
            assert ended.wait(300)
            kept.append(len(list((run / ".claims").glob("*/*"))))
        commit(store, names, lines)

    monkeypatch.setattr(claims, "claimed_batches", to_the_end)
    monkeypatch.setattr(LocalStore, "commit", late)
    as_rank(run, 0, lease=300.0)
    assert kept == [12] and not (run / ".claims").exists()


def test_a_claim_after_the_first_worker_has_removed_all(tmp_path):
    with Claims(tmp_path, RunLocation("x", 1, 2, "g"), 60.0) as late:
        assert late.claim(1)
        remove_claims(RunLocation(str(tmp_path), 0, 2, "g"))
        assert late.claim(3) and not late.claim(3)


def test_a_batch_is_not_made_again_where_claims_are_removed(tmp_path):
    """Rank 0 recorded it and removed its claim after rank 1 had asked what remains."""
    left = iter([[0], []])
    location = RunLocation(str(tmp_path), 1, 2, "g")
    assert not list(claims.claimed_batches(location, [0], lambda: next(left, []), StopFlag()))


def test_what_others_made_while_the_engine_was_loaded_is_not_made_again(tmp_path):
    location = RunLocation(str(tmp_path), 1, 2, "g")

    def load():
        as_rank(tmp_path, 0)
        return engine()

    with open_locked(location) as store:
        run = planned(store, TABLE, 2)
        tally = execute(run, load, location, WorkOptions(lease=LEASE), StopFlag())
    assert tally.done == 0 and not (tmp_path / ".claims").exists()
    assert set(recorded(tmp_path).values()) == {1}


def test_a_stop_while_waiting_for_others_is_one(tmp_path):
    stop = StopFlag()
    location = RunLocation(str(tmp_path), 0, 2, "g")
    with open_locked(location) as store:
        run = planned(store, TABLE, 2)
        with Claims(tmp_path, RunLocation(str(tmp_path), 1, 2, "g"), 300.0) as other:
            assert other.claim(3)
            made = []

            def on_written(lines):
                made.extend(lines)
                if len(made) == 22:  # all but the batch of the other
                    stop.set(signal.SIGTERM)

            options = WorkOptions(lease=300.0)
            tally = execute(run, engine, location, options, stop, on_written)
    assert tally.stopped and tally.done == 22


def test_a_claim_holds_until_its_owner_is_silent(tmp_path):
    first, second = (Claims(tmp_path, RunLocation("x", rank, 2, "g"), 60.0) for rank in (0, 1))
    with second:
        assert first.claim(3) and not second.claim(3)
        (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
        long_ago = time.time() - 61
        os.utime(path, (long_ago, long_ago))
        assert second.claim(3)


def test_a_claim_is_kept_fresh(tmp_path):
    with Claims(tmp_path, RunLocation("x", 0, 2, "g"), 0.04) as held:
        assert held.claim(3)
        (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 300
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert path.stat().st_mtime > 0
    held._beat.join()
    os.utime(path, (0, 0))
    assert path.stat().st_mtime == 0, "its owner is silent"


def test_workers_of_another_run_are_refused(tmp_path):
    with open_locked(RunLocation(str(tmp_path), 0, 2, "one")):
        with pytest.raises(SamplerError) as caught:
            with open_locked(RunLocation(str(tmp_path), 0, 2, "two")):
                pass
        assert caught.value.code == 4
        with open_locked(RunLocation(str(tmp_path), 1, 2, "one")):
            pass


def test_torchrun_says_who_one_is(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SamplerError, match="start it with torchrun"):
        location_for("x", "torchrun")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    location = location_for("x", "torchrun")
    assert (location.rank, location.world) == (1, 3) and location.group is not None


def elastic_rank(where):
    """Run one rank of torchrun; at its first start rank 1 dies once a batch of it is recorded."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's own has come along with the fork
    location = location_for(where, "torchrun")
    assert location.world == 2
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def waiting(adapter, *_):
        if first and location.rank == 0 and len(adapter.batches) == 4:  # three steps a batch
            time.sleep(300)  # until torchrun ends this rank too

    def on_written(lines):
        if first and location.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with open_locked(location) as store:
        run = planned(store, TABLE, 2) if location.rank == 0 else wait_for_plan(store)
        made = engine(trouble=waiting)
        execute(run, lambda: made, location, WorkOptions(lease=LEASE), StopFlag(), on_written)


def test_torchrun_with_one_killed(tmp_path, whole):
    """torchrun ends all ranks when one dies, and starts them again; the run goes on."""
    from torch.distributed import run

    script = tmp_path / "rank.py"
    script.write_text(
        "import sys\nfrom tests.runs.test_workers import elastic_rank\nelastic_rank(sys.argv[1])\n"
    )
    line = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
            "--start-method", "fork", "--run-path", str(script), str(tmp_path / "run")]  # fmt: skip
    # In forks: five interpreters would import torch for half a minute.
    assert os.waitpid(fork(lambda: run.main(line)), 0)[1] == 0
    assert contents(tmp_path / "run") == whole
    assert (tmp_path / "run" / "journal-1.jsonl").exists()
