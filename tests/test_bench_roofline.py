"""The calculated times of a step are what their formula gives."""

import csv

import pytest

from sampler.core.benchmark import CASES, SIZES
from scripts.bench import roofline


def test_the_formula():
    """3 launches and 32 bytes per element at 0.9 of 4.8 TB/s."""
    made = roofline.microseconds(roofline.Traffic(3, 32.0), 65536, roofline.BANDWIDTH["H200"])
    assert made == pytest.approx(6 + 32 * 65536 / (0.9 * 4.8e12) * 1e6)


def test_the_traffic_of_each_side_is_counted():
    cfg, apg = (next(c for c in CASES if c.name == n) for n in ("CFG + DDIM", "APG + DDIM"))
    found = roofline.sides(cfg)
    assert found["ours"] == (1, 12.0) and found["diffusers"].launches == 12
    assert roofline.sides(apg)["ours"].launches == 3
    assert "diffusers" not in roofline.sides(next(c for c in CASES if c.name == "APG + GHVB"))


def test_rows_for_every_size_and_gpu(tmp_path):
    path = tmp_path / "a" / "roofline.csv"
    roofline.main(["--csv", str(path)])
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(roofline.NAMES) * len(SIZES) * 2
    assert all(float(r["ours µs"]) < float(r["reference µs"]) for r in rows)
