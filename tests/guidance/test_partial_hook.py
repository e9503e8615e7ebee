"""Rows and whole steps that a rule leaves out, in stock pipelines: what the network sees."""

from dataclasses import dataclass

import pytest
import torch

import sampler
from sampler import registry
from sampler.types import GuidanceBase, Prediction
from tests.guidance.stock import SCALE, STEPS, STOCK, Rows
from tests.laws.world import Rests

pytestmark = pytest.mark.filterwarnings("ignore")
CFG = registry.build("guidance", {"name": "cfg", "scale": SCALE})


@dataclass(frozen=True)
class EverySecond(GuidanceBase):
    """CFG at even steps; its last output once more, without any branch, at odd ones."""

    needs = CFG.needs

    def start(self, cond):
        return None

    def plan(self, x, span, cond, state):
        return {} if span.index % 2 else CFG.plan(x, span, cond, ())

    def combine(self, x, preds, span, state):
        if span.index % 2:
            assert not preds
            return Prediction.of(state["kind"], x, state["out"], span.now), state
        pred, _ = CFG.combine(x, preds, span, ())
        return pred, {"kind": pred.kind, "out": pred.out}


@pytest.fixture(params=STOCK)
def stock(request):
    return STOCK[request.param]


def test_a_step_without_branches_calls_no_network(stock):
    pipe = stock.build()
    counted = Rows(getattr(pipe, stock.network))
    with sampler.guide(pipe, EverySecond()) as calls:
        images = stock.run(pipe)
    assert calls.nfe == [6, 6] and images.isfinite().all()
    assert len(counted.rows) == (6 if stock.sequential else 3) and sum(counted.rows) == 12


def test_rows_left_out_of_both_branches(stock):
    pipe = stock.build()
    counted = Rows(getattr(pipe, stock.network))
    rule = Rests(CFG)
    with sampler.guide(pipe, rule) as calls:
        together = stock.run(pipe)
    due = [rule.due(torch.zeros(2, 1), sampler.Span(i, None, None)) for i in range(STEPS)]
    assert calls.nfe == [2 * int(sum(row)) for row in zip(*due, strict=True)]
    assert sum(counted.rows) == sum(calls.nfe)
    plain = stock.run(pipe)
    assert together.isfinite().all() and not torch.allclose(together, plain)
