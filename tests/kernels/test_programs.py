"""Launches of a step, walked and replayed, program by program, and the walks of its formulas.

programs.json is written by `python -m tests.kernels.test_programs`, where a change is intended.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from sampler_kernels import Lin, replay, selection, triton_ops, use_backend

from sampler.core.benchmark import CASES, BenchmarkStep

GOLDEN = Path(__file__).with_name("programs.json")
SHAPE = (2, 4, 8, 8)
KERNELS = ("_formula", "_gram", "_scalar")


class Recorder:
    """Takes the place of a kernel: records compile-time constants and numbers, computes nothing."""

    def __init__(self, name, found):
        self.name, self.found = name, found

    def __getitem__(self, grid):
        def launch(*args, **constants):
            consts = [a for a in args if isinstance(a, tuple) and a and type(a[0]) is float]
            numbers = [round(v, 6) for a in consts for v in a]
            values = {k: v for k, v in constants.items() if k not in ("BLOCK", "LANES")}
            self.found.append({"kernel": self.name, "grid": grid[0], "consts": numbers, **values})

        return launch


@pytest.fixture(params=["walked", "replayed"])
def launches(monkeypatch, request):
    """Arguments of the launches, and the number of calls of a step before it counts."""
    found = []
    monkeypatch.setattr(replay, "_settled", {})
    monkeypatch.setattr(replay, "_reduced", {})
    if request.param == "replayed":
        monkeypatch.setattr(replay, "OFTEN", 1)
    for name in KERNELS:
        monkeypatch.setattr(triton_ops, name, Recorder(name, found))
    monkeypatch.setattr(selection, "works", lambda device: True)
    with torch.no_grad(), use_backend("triton"):
        yield found, int(request.param == "replayed")


def prepared(case, launches):
    """The list of launches, empty, and a step that has been called."""
    (found, calls), step = launches, BenchmarkStep(case, SHAPE)
    for _ in range(calls):
        step()
    found.clear()
    return found, step


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_programs_of_a_step_are_these(case, launches):
    found, step = prepared(case, launches)
    step()
    right = json.loads(GOLDEN.read_text(encoding="utf-8"))[case.name]
    assert json.loads(json.dumps(found)) == right


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_formula_is_walked_at_most_three_times_per_step(case, launches, monkeypatch):
    """Every walk reads the operands of a node, which are counted."""
    _, step = prepared(case, launches)
    reads, real, alive = Counter(), Lin.a, []

    def counted(node):
        reads[id(node)] += 1
        alive.append(node)  # or another node could get its id
        return real.__get__(node)

    monkeypatch.setattr(Lin, "a", property(counted, real.__set__))
    step()
    inner = {id(node): node for node in alive if node.op > 2}  # leaves are read for their tensors
    assert inner and max(reads[key] for key in inner) <= 1 + 3  # once to build the node above


def main():
    found = {}
    for case in CASES:
        launches = []
        for name in KERNELS:
            setattr(triton_ops, name, Recorder(name, launches))
        selection.works = lambda device: True
        step = BenchmarkStep(case, SHAPE)
        with torch.no_grad(), use_backend("triton"):
            step()
        found[case.name] = launches
    text = (
        json.dumps(found)
        .replace('[{"kernel"', '[\n{"kernel"')
        .replace(', {"kernel"', ',\n{"kernel"')
    )
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
