"""The host-time benchmark runs, and compares what it says. Its times decide nothing here."""

import csv

import pytest
import torch
from sampler_kernels import triton_ops

from scripts.bench import host


def test_it_writes_a_row_per_case_with_its_ratio(tmp_path, capsys):
    path = tmp_path / "figures" / "host_time.csv"
    host.main(["--rounds", "1", "--csv", str(path)])
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == list(host.NAMES)
    for row in rows:
        side, most = host.TARGETS[row["case"]]
        assert (row["compared with"], float(row["at most"])) == (side, most)
        ratio = float(row["ours µs"]) / float(row["its µs"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=0.05)
        assert row["reached"] == str(float(row["ratio"]) <= most)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_the_stub_launches_nothing_and_is_taken_back():
    real = triton_ops._formula
    side = host.sides("CFG + DDIM")["ours"]
    with torch.no_grad(), side.context():
        assert isinstance(triton_ops._formula, host.Stub)
        mean, _ = side.call()
    assert mean.shape == host.SHAPE and triton_ops._formula is real


def test_sides_take_turns_each_in_its_context():
    order = []

    class Context:
        def __enter__(self):
            order.append("in")

        def __exit__(self, *_):
            order.append("out")

    sides = {n: host.Side(lambda n=n: order.append(n), Context) for n in "ab"}
    found = host.fastest(sides, 2)
    turn = [event for n in "ab" for event in ("in", *[n] * host.CALLS, "out")]
    assert order == turn * 2 and set(found) == {"a", "b"}


def test_the_wait_of_adaptive_guidance_is_measured_up_to_the_network(capsys):
    from sampler.guidance import adaptive

    real = adaptive.wait
    assert 0 < host.waiting(steps=3) < 1e6
    assert adaptive.wait is real


def test_the_parts_of_a_step_end_with_the_whole(capsys):
    found = host.parts("APG + GHVB", 3)
    assert list(found) == ["predictions", "rule", "sampler", "settle"]
    assert 0 < found["predictions"] < found["settle"]
    host.main(["--parts", "--rounds", "1"])
    assert [line.split(" {")[0] for line in capsys.readouterr().out.splitlines()] == list(
        host.NAMES
    )
