"""The benchmark's own table, and its numbers where they can be known."""

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from sampler.cli import app
from sampler.core.benchmark import CASES, cost
from scripts.bench import gpu
from scripts.bench import kernels as bench


def test_the_command_shows_every_case():
    shown = CliRunner().invoke(app, ["bench", "--kernels"])
    assert shown.exit_code == 0 and all(case.name in shown.stdout for case in CASES)
    lines = CliRunner().invoke(app, ["bench", "--kernels", "--json"]).stdout.splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}
    assert rows["CFG + DDIM"]["kernels"] == 1 and rows["APG + DDIM"]["kernels"] == 3


def test_cost_counts_the_flops_of_one_call():
    a = torch.ones(100, 200)
    result, row = cost(lambda: a @ a.T)
    assert result.shape == (100, 100)
    assert row["GFLOP"] == round(2 * 100 * 200 * 100 / 1e9, 2) and row["peak MiB"] > 1


def test_the_gpu_part_runs_on_a_cpu_too():
    """Every line that a GPU machine would run, but for events, graphs and compilation."""
    rows = list(gpu.gpu_rows(gpu.Dry(), {"SDXL, 1024²": (1, 8, 8)}, (2, 1)))
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    for row in rows:
        stock = row["case"] in ("CFG + DDIM", "APG + DDIM")
        assert (row["diffusers µs"] != "") == stock
        times = [v for k, v in row.items() if k.endswith("µs") and k != "diffusers µs"]
        assert len(times) == 7 and all(v > 0 for v in times)
        assert row["launches"] == (1 if row["case"].startswith("CFG +") else 3)
        assert row["elements"] == 64 and row["bytes"] >= 12 * 64


def test_the_bars_are_read_off_the_rows():
    row = {"of copy": 0.87, "diffusers µs": 90.0, "ours in a graph µs": 5.0}
    row |= {"compiled reference in a graph µs": 4.5}
    rows = [{**row, "case": case, "size": size} for case in ("CFG + DDIM", "APG + DDIM")
            for size in (gpu.BIG, "SDXL, 1024²")]  # fmt: skip
    found = {
        (b["case"], b["size"], b["bar"].split(" >=")[0]): b["reached"] for b in bench.bars(rows)
    }
    assert not found["CFG + DDIM", gpu.BIG, "share of copy"]
    assert found["APG + DDIM", gpu.BIG, "share of copy"]
    assert found["APG + DDIM", "SDXL, 1024²", "6 µs / graph replay"]
    assert found["APG + DDIM", "SDXL, 1024²", "eager diffusers / ours"]
    assert not found["CFG + DDIM", "SDXL, 1024²", "compiled / ours"]


def test_errors_counts_and_tables(tmp_path, capsys):
    assert [row["case"] for row in bench.errors()] == [case.name for case in CASES]
    bench._write(tmp_path / "a" / "counts.csv", list(bench.counts()))
    note, *lines = (tmp_path / "a" / "counts.csv").read_text(encoding="utf-8").splitlines()
    assert note.startswith("# python -m scripts.bench.kernels; ") and torch.__version__ in note
    assert [row["case"] for row in csv.DictReader(lines)] == [case.name for case in CASES]
    assert "APG + GHVB" in capsys.readouterr().out


def test_a_wrong_kernel_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(
        bench, "_double", lambda v: v.double() * 1.00001 if hasattr(v, "dtype") else v
    )
    with pytest.raises(SystemExit, match="CFG . DDIM.*no times are taken"):
        list(bench.errors())
