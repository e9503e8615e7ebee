"""The law of partial branches: any rule may leave rows of any branch out, and fills them itself."""

import pytest
import torch

import sampler
from sampler import registry
from sampler.core.denoisers import BatchedDenoiser
from sampler.types import Branch, Prediction
from tests.analytic import vp_grid
from tests.laws.world import Counting, Rests, buildable, cond, noise, spec

# forecast leaves rows out itself and is the outermost rule
NAMES = [name for name in buildable("guidance") if name != "forecast"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_left_out_of_every_branch_do_not_show_in_the_others(name):
    rule, levels, x = registry.build("guidance", spec("guidance", name)), vp_grid(8), noise(3)
    counting = Counting()
    engine = sampler.Engine(counting.denoiser)
    snapshot, grid = engine.start(x, levels, cond(3), "ddim", Rests(rule))
    *_, together = engine.steps(snapshot, grid, cond(3), "ddim", Rests(rule))
    assert sum(counting.rows) == sum(together.nfe)
    for row in range(3):
        own = Rests(rule, first=row)
        snapshot, grid = engine.start(x[row : row + 1], levels, cond(1), "ddim", own)
        *_, alone = engine.steps(snapshot, grid, cond(1), "ddim", own)
        assert torch.equal(alone.x[0], together.x[row])
        assert alone.nfe[0] == together.nfe[row]


class Echo(BatchedDenoiser):
    """Predicts the condition [R, 1] itself, and keeps the number of rows of each call."""

    def __init__(self):
        self.rows = []

    def forward(self, x, level, cond, model):
        self.rows.append(x.shape[0])
        return cond.expand_as(x)

    def predict(self, x, out, level, model):
        return Prediction.of("v", x, out, level)


NONE, FIRST, BOTH = (torch.tensor(v) for v in ([False, False], [True, False], [True, True]))


@pytest.mark.parametrize(
    ("cond_rows", "uncond_rows", "found"),
    [
        (FIRST, BOTH, {"cond": [1, 0], "uncond": [3, 4]}),
        (FIRST, ~FIRST, {"cond": [1, 0], "uncond": [1, 4]}),
        (BOTH, ~FIRST, {"cond": [1, 2], "uncond": [1, 4]}),
        (NONE, ~FIRST, {"uncond": [0, 4]}),
        (FIRST, NONE, {"cond": [1, 0]}),
        (NONE, NONE, {}),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_what_comes_back_for_rows_left_out(cond_rows, uncond_rows, found, order):
    values = {"cond": torch.tensor([[1.0], [2.0]]), "uncond": torch.tensor([[3.0], [4.0]])}
    rows = {"cond": cond_rows, "uncond": uncond_rows}
    branches = {name: Branch(values[name], rows=rows[name]) for name in list(rows)[::order]}
    span = sampler.Span(0, sampler.Level(5, 0.8, 0.6), sampler.Level(0, 1.0, 0.0))
    denoiser, nfe = Echo(), [0, 0]
    preds = denoiser(torch.zeros(2, 3), span, branches, nfe)
    assert {k: pred.out.tensor()[:, 0].tolist() for k, pred in preds.items()} == found
    assert sum(denoiser.rows) == sum(nfe) == int(cond_rows.sum() + uncond_rows.sum())
