"""Extension of a run: what was made stays byte for byte, and only what is new is computed."""

import itertools
import json

import pytest

from sampler.cli import main
from sampler.core.errors import RunFolderError
from sampler.runs.extend import extend
from sampler.runs.folder import OutputOptions, RunFolder
from sampler.runs.location import RunLocation, open_locked
from sampler.runs.planner import Planner
from sampler.runs.records import records
from sampler.runs.start import plan_run
from sampler.runs.stop import StopFlag
from sampler.runs.store import open_store
from sampler.runs.verify import findings
from sampler.workers.execute import execute
from sampler.workers.work import WorkOptions
from tests.runs.stub import MODEL, RawLine, defaults, engine, make, pictures


def rows(*texts, **cells):
    return [RawLine(f"f:{k}", {"prompt": text, **cells}) for k, text in enumerate(texts, 1)]


def plan_of(table, n=1, output=None, config=None, **options):
    planner = Planner(MODEL, defaults(n=n), 4, **options)
    return plan_run(planner, table, output, config)


def extended(where, planned):
    """Extend a run and complete it. Returns (run, number added, sizes of the computed batches)."""
    made = engine()
    with open_locked(RunLocation(str(where))) as store:
        found = extend(store, planned)
        execute(found.run, lambda: made, RunLocation(str(where)), WorkOptions(), StopFlag())
    sizes = [size // 2 for size in made.pipeline.batches[::3]]  # of two branches, three steps
    return found.run, found.added, sizes


@pytest.fixture
def where(tmp_path):
    make(tmp_path / "run", rows("a", "b", "c", "d", "e", seed=3))
    return tmp_path / "run"


def same_files(before, after):
    return {name: after.get(name) for name in before} == before


def test_rows_are_added_behind_those_that_are_there(where):
    before = pictures(where)
    longer = rows("new", "a", "b", "c", "d", "e", "f", seed=3)
    run, added, batches = extended(where, plan_of(longer))
    after = pictures(where)
    assert (added, run.total, batches) == (2, 7, [2]) and same_files(before, after)
    assert [job.prompt for job in run.jobs()] == ["a", "b", "c", "d", "e", "new", "f"]
    assert [job.line for job in run.jobs()] == [1, 2, 3, 4, 5, 0, 6], "as in the longer file"
    assert list(findings(run)) == [] and not run.missing()
    alone, _ = make(where.parent / "alone", rows("new", "f", seed=3))
    assert after["000005-" + run.key(5)[:10] + ".png"] in pictures(alone.store.root).values()
    assert extended(where, plan_of(longer))[1:] == (0, [])
    assert make(where, rows("a", "b", "c", "d", "e", "new", "f", seed=3))[1].done == 0


def test_more_images_of_every_prompt_are_added(where):
    before = pictures(where)
    run, added, batches = extended(where, plan_of(rows("a", "b", "c", "d", "e", seed=3), n=2))
    assert (added, batches) == (5, [4, 1]) and same_files(before, pictures(where))
    assert [job.seed for job in run.jobs()] == [3] * 5 + [4] * 5
    assert [job.line for job in run.jobs()] == [0, 1, 2, 3, 4] * 2


def test_other_rows_and_settings_are_numbered_behind(where):
    table = rows("x", "b", "y", "x", seed=3) + rows("a", seed=3, steps=4)
    run, added, _ = extended(where, plan_of(table))
    assert added == 3 and [job.line for job in run.jobs()][5:] == [5, 7, 9]
    assert run.duplicates == [(6, 1), (8, 5)] and len(run.groups) == 2
    assert [record["lines"] for record in records(run)][1] == [1, 6]
    assert list(findings(run)) == [] and not run.missing()


def test_what_belongs_to_another_run_is_not_added(where):
    files = {path.name: path.read_bytes() for path in where.glob("*.json*")}
    for planned, word in [
        (plan_of(rows("x"), output=OutputOptions(metadata="none")), "output"),
        (plan_of(rows("x"), config={"axes": [{"name": "steps"}]}), "axes"),
    ]:
        with pytest.raises(RunFolderError, match=f"different: {word}"):
            extended(where, planned)
    assert files == {path.name: path.read_bytes() for path in where.glob("*.json*")}


@pytest.mark.parametrize("writes", range(3))
def test_an_extension_that_is_cut_short_can_be_repeated(where, monkeypatch, writes):
    """After any of its three writes the folder is the old run or the new one, and whole."""
    count = itertools.count()

    class Killed(BaseException):
        pass

    def stopping(name):
        real = getattr(type(open_store(where)), name)

        def write(self, file, *data):
            if next(count) == writes:
                raise Killed
            return real(self, file, *data)

        return write

    planned = plan_of(rows("a", "b", "c", "d", "e", "f", seed=3))
    with monkeypatch.context() as patch:
        for name in ("new", "put"):
            patch.setattr(type(open_store(where)), name, stopping(name))
        with pytest.raises(Killed):
            extend(open_store(where), planned)
    run = RunFolder(open_store(where))
    assert run.total == (6 if writes == 2 else 5) and list(findings(run)) == []
    run, added, _ = extended(where, planned)
    assert added == (0 if writes == 2 else 1) and run.total == len(pictures(where)) == 6


def test_the_command_line_extends(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["generate", "a fox", "--steps", "1", "-o", "run"]
    assert main(line) == 0
    capsys.readouterr()
    assert main([*line, "-n", "2"]) == 4 and "Use --extend to add to it" in capsys.readouterr().err
    assert main([*line, "-n", "2", "--extend"]) == 0
    assert "1 image added to the 1 of run." in capsys.readouterr().err
    assert main([*line, "-n", "2"]) == 0, "the same plan now"
    assert json.loads((tmp_path / "run/run.json").read_text())["plan"]
    assert len(pictures(tmp_path / "run")) == 2
