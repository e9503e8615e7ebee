"""The worked examples of docs/examples; tests/test_plugins.py has the plug-in beside them."""

import runpy

import pytest
import torch

import sampler
from sampler.engine.inspection.probe import ridge_probe
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def noprop():
    return runpy.run_path(str(ROOT / "docs" / "examples" / "noprop.py"))


def test_noprop_reads_features_as_well_as_the_ridge_probe(noprop):
    engine = sampler.load("bundled-student")
    images, labels = noprop["images_and_labels"](engine)
    (x,) = engine.features(images, pool=1).values()
    fit = torch.arange(len(x)) % 2 == 0
    x = (x - x[fit].mean(0)) / x[fit].std(0)
    classes, levels = len(noprop["CONCEPTS"]), noprop["label_levels"]()
    torch.manual_seed(0)
    blocks = noprop["train"](x[fit], labels[fit], levels)
    found = noprop["classify"](blocks, x[~fit], classes, levels)
    accuracy = float((found == labels[~fit]).double().mean())
    assert accuracy >= ridge_probe(x[fit], labels[fit]).accuracy(x[~fit], labels[~fit]).value - 0.05
    # The same noise with the features of other images gives their classes, so the class is read
    # from the features, and no label leaks through z.
    moved = noprop["classify"](blocks, x[~fit].roll(10, 0), classes, levels)
    assert float((moved == labels[~fit].roll(10)).double().mean()) >= accuracy - 0.05


def test_noprop_visits_each_block_once_from_noise_to_the_embedding(noprop):
    seen, levels = [], noprop["label_levels"](4)

    class Block(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, row):
            z, target = row.split(3, 1)
            seen.append((self.number, float(z.square().mean())))
            return target

    targets = torch.eye(3).repeat(200, 1)
    blocks = torch.nn.ModuleList(Block(k) for k in range(4))
    found = noprop["classify"](blocks, targets, 3, levels)
    assert torch.equal(found, targets.argmax(1)) and [number for number, _ in seen] == [0, 1, 2, 3]
    # E z² = alpha²/3 + sigma² under the law that the blocks are trained on
    right = [level.alpha**2 / 3 + level.sigma**2 for level in levels[:-1]]
    assert [power for _, power in seen] == pytest.approx(right, abs=0.1)
