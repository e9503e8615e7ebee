"""Exported tables are prompt files of the same images."""

import csv
import io
import json

import pytest

from sampler import registry
from sampler.cli import main
from sampler.runs.exported import cell_of, protected, settings_of_row, strategy_columns
from sampler.runs.planner import Planner
from sampler.runs.readers import RawLine
from sampler.runs.settings import complete_spec
from sampler.runs.tables import read_table
from tests.runs.stub import MODEL, defaults, pictures

NESTED = [
    ("guidance", {"name": "adaptive", "rule": {"name": "apg", "scale": 4, "eta": 0.5}}),
    ("guidance", {"name": "cfg", "interval": [0.2, 0.9]}),
    ("guidance", {"name": "sum", "rules": [{"name": "cfg", "scale": 2}, "autoguidance"]}),
    ("sampler", {"name": "heavy_ball", "momentum_number": 1.5, "base": "unipc"}),
]


def every_strategy():
    for kind in ("sampler", "guidance"):
        for name in registry.names(kind):
            try:
                yield kind, complete_spec(kind, name)
            except ValueError:
                continue  # needs fields, or files that are not here


CASES = [(kind, complete_spec(kind, spec)) for kind, spec in NESTED] + list(every_strategy())


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=lambda value: str(value)[:40])
def test_a_strategy_is_read_from_its_columns(tmp_path, kind, spec):
    row = {
        "index": 0,
        "key": "x",
        "status": "ok",
        "prompt": "a",
        **dict(strategy_columns(kind, spec)),
    }
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, row)
    writer.writeheader()
    writer.writerow({key: cell_of(key, value) for key, value in row.items()})
    (tmp_path / "p.csv").write_text(buffer.getvalue())
    with pytest.warns(UserWarning, match="its columns of results .* are not read"):
        (line,) = read_table(tmp_path / "p.csv")
    planner = Planner(MODEL, defaults())
    list(planner.jobs([line]))
    assert getattr(planner.plan.groups[0], kind) == spec


@pytest.mark.parametrize("text", ["=1+1", "'=1", "''-a", "'a'", "a", "@", "+", "\tb", "'"])
def test_text_is_protected_from_spreadsheets_and_read_again(text):
    cell = protected(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t"))
    assert settings_of_row({"prompt": cell, "key": "x", "axis_steps": "1"}) == {"prompt": text}


@pytest.mark.filterwarnings("ignore:.*an exported table")
def test_an_exported_run_is_generated_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": '=a fox\nin "snow"', "seed": 2**60 + 1, "steps": 2, "tag": "-x", "meta_id": "7"},
        {"prompt": "", "negative_prompt": "'+b", "guidance": {"name": "apg", "eta": 0.25}},
        {"prompt": "a dog", "sampler": {"name": "ab", "order": 1}, "guidance": "none", "n": 2},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["generate", "--steps", "1", "--batch-size", "1", "-q"]
    assert main([*line, "--prompts", "p.jsonl", "-o", "run"]) == 0
    assert main(["export", "run", "--to", "csv"]) == 0
    assert main([*line, "--prompts", "run/results.csv", "-o", "again"]) == 0
    found, again = pictures(tmp_path / "run"), pictures(tmp_path / "again")
    assert len(found) == 4 and found == again
    jobs = [json.loads(text) for text in (tmp_path / "again/jobs.jsonl").read_text().splitlines()]
    assert jobs[0]["tag"] == "-x" and jobs[0]["meta"] == {"meta_id": "7"}


def test_a_table_of_ones_own_keeps_its_quotes():
    (job,) = Planner(MODEL, defaults()).jobs([RawLine("f:1", {"prompt": "'=1"}, True)])
    assert job.prompt == "'=1"
