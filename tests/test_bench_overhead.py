"""The overhead benchmark runs, and its arithmetic is right. Its times decide nothing here."""

import csv

import numpy as np
import pytest
import torch

from scripts.bench import overhead as bench


def test_it_runs_with_tiny_counts_and_writes_its_rows(tmp_path, capsys):
    bench.main(["--quick", "--csv", str(tmp_path / "figures" / "overhead.csv")])
    with (tmp_path / "figures" / "overhead.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["pipeline"], r["network"]) for r in rows] == [
        ("bundled", "real"),
        ("bundled", "stub"),
        ("tiny SD", "real"),
        ("tiny SD", "stub"),
    ]
    for row in rows:
        assert row["pairs"] == "2" and "torch" in row["versions"] and row["machine"] and row["date"]
        assert float(row["low"]) <= float(row["ratio"]) <= float(row["high"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_summary_is_the_median_of_paired_ratios():
    seconds = np.array([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]])
    made = bench.summary(seconds, 10)
    assert made["ratio"] == 0.75
    assert (made["engine_ms_per_step"], made["stock_ms_per_step"]) == (200.0, 200.0)
    assert (made["low"], made["high"]) == (0.5, 1.0)


def test_the_sides_take_turns():
    order = []
    bench.pairs_of(lambda: order.append("a"), lambda: order.append("b"), 4)
    assert "".join(order) == "abbaabba"


def test_both_sides_ask_the_same_of_the_network():
    pipe = bench.bundled_pipeline()
    with bench.stubbed(pipe):
        stub = pipe.unet
        calls = []
        stub.register_forward_pre_hook(lambda _, args: calls.append((args[0].shape, int(args[1]))))
        ours, stock = bench.sides(pipe)
        first = ours(4)
        mine, calls[:] = list(calls), []
        assert torch.equal(first, stock(4))
        assert mine == calls and len(mine) == 4
    assert pipe.unet is not stub


def test_sides_that_differ_are_not_compared(monkeypatch):
    pipe = bench.bundled_pipeline()
    monkeypatch.setattr(bench, "sides", lambda _: (torch.zeros, torch.ones))
    with pytest.raises(SystemExit, match="cannot be compared"):
        next(bench.measure("x", pipe, bench.QUICK))
