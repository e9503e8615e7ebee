"""The benchmark of hosting runs, and its arithmetic is right. Its times decide nothing here."""

import numpy as np
import pytest
import torch

from scripts.bench import hosting as bench
from scripts.bench.hosting_cases import tiny


def test_the_hook_and_hosting_do_the_same_work():
    case = tiny()
    for measure in (bench.hook, bench.same_work, bench.hook_step):
        found = measure(case, 1, 2, 2)
        assert found["low"] <= found["value"] <= found["high"]


def test_the_rule_saves_the_evaluations_that_it_leaves_out():
    found = bench.adaptive(tiny(), 1, 4, 2)
    assert 0.2 < found["evaluations"] < 0.5  # four steps of two rows, pairs at the first and fourth
    assert found["networks"] > -1


def test_peaks_are_of_the_fork():
    small, large = (bench.peak(lambda n=n: torch.ones(n << 18)) for n in (1, 200))
    assert 150 < large - small < 250


def test_sides_that_differ_are_not_compared():
    with pytest.raises(SystemExit, match="cannot be compared"):
        bench.same(torch.ones(2), torch.tensor([1.0, 1.1]))
    bench.same(torch.ones(2), torch.ones(2))


def test_the_interval_holds_the_median():
    found = bench.interval(np.array([1.0, 2.0, 4.0]))
    assert found["value"] == 2.0 and found["low"] == 1.0 and found["high"] == 4.0
