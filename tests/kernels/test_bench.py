"""The benchmark's own table, and its numbers where they can be known."""

import json

import torch
from typer.testing import CliRunner

from sampler.benchmark import CASES, cost
from sampler.cli import app


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
