"""The studies of the trainers: a cell from training to table, its votes, and the page."""

import csv
import json
from dataclasses import replace

import pytest
import torch

import sampler
from sampler.rewards.ballots import read_votes, write_ballot
from sampler.rewards.scoring import score
from scripts.study import training, training_cells, training_page
from scripts.study.finetune import captions


def votes(folder, seed, wrong):
    (folder / "votes.jsonl").unlink(missing_ok=True)
    training._vote(folder, seed, wrong)
    return [vote["vote"] for vote in read_votes(folder)]


def test_the_voter_is_the_classifier_with_a_share_of_wrong_votes(tmp_path):
    """The better half of each prompt's images is good; all wrong is the contrary."""
    prompts = [text for text in captions(2) for _ in range(4)]
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    write_ballot(tmp_path / "1", "binary", images, prompts)
    seen = (images * 255).round() / 255
    scores = score(sampler.build("reward", "classifier"), seen, prompts).view(2, 4)
    best = torch.zeros(2, 4).scatter(1, scores.topk(2).indices, 1).flatten().int().tolist()
    assert votes(tmp_path / "1", 0, 0.0) == best
    assert votes(tmp_path / "1", 0, 1.0) == [1 - vote for vote in best]
    flipped = [votes(tmp_path / "1", seed, 0.5) for seed in (0, 0, 1)]
    assert flipped[0] == flipped[1] != flipped[2]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two seeds of the votes and of alignprop, of one update each."""
    out = tmp_path_factory.mktemp("study")
    names = {"10% wrong": "S6", "alignprop": "S1"}
    own = [c for c in training.CELLS if names.get(c.name) == c.study][:2]
    small = {"batch": 4, "mixed_precision": "no", "steps": 2}
    cells = [
        replace(
            c, images=4, seconds=None, seeds=(0, 1), fit={**c.fit, **small},
            trainer={**c.trainer, **({"group_size": 2} if "group_size" in c.trainer else {})},
        )
        for c in own
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module in (training, training_cells, training_page):
            patch.setattr(module, "CELLS", tuple(cells))
        patch.setattr(training_cells, "BLOCKS", (tuple(cells),))
        patch.setattr(training, "STEPS", 2)
        patch.setattr(training, "texts", lambda: tuple(captions(2)))
        patch.setattr(training, "REPEATS", 2)
        before = torch.get_num_threads()
        for number, seed in training_cells.queue():
            training.cell(number, seed, out)
        torch.set_num_threads(before)
        yield out, cells, training_cells.lines_of({}, out)


def test_a_cell_is_trained_judged_and_compared(study):
    out, cells, rows = study
    for cell in cells:
        mine = [r for r in rows if (r["cell"], r["scorer"]) == (cell.name, "classifier")]
        assert [str(r["seed"]) for r in mine] == ["0", "1", "0+1"]
        assert all(r["made"] == 4 and float(r["cpu_seconds"]) > 0 for r in mine[:2])
        assert len({r["other"] for r in mine}) == 1, "one base for all"
        means = [float(r["mean"]) for r in mine]
        assert means[2] == pytest.approx((means[0] + means[1]) / 2, abs=1e-4)
        for r in mine:
            gap = float(r["mean"]) - float(r["other"])
            assert float(r["difference"]) == pytest.approx(gap, abs=1e-4)
    drift = [float(r["mean"]) for r in rows if r["scorer"] == "drift"]
    assert len(drift) == 6 and min(drift) > 0, "the trained LoRA was on"
    assert json.loads((out / "base" / "bundled-flow-ddim" / "eval.json").read_text())


def test_a_call_goes_on_with_what_is_missing(study, monkeypatch, tmp_path):
    out, cells, _ = study
    monkeypatch.setattr(
        training.subprocess, "run", lambda *_, **__: pytest.fail("a finished cell was run again")
    )
    (tmp_path / "figures").mkdir()
    training.run(out, tmp_path)
    assert cells[0].file(out, 1).is_file()
    training.page(tmp_path)
    text = (tmp_path / "training_study.md").read_text()
    table = list(csv.DictReader((tmp_path / "figures" / "training_study.csv").open()))
    gain = next(float(r["difference"]) for r in table if r["seed"] == "0+1")
    assert f"{gain:+.3f} (" in text and "## What has not been run" not in text


def row(cell, gain, width, seconds=10, seed="0+1+2"):
    return {
        "study": "S1", "cell": cell, "reward": "classifier", "budget": "512 images", "seed": seed,
        "sampler": "ddim", "scorer": "classifier", "difference": gain, "cpu_seconds": seconds,
        "difference_low": gain - width, "difference_high": gain + width,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nft", "ddpo", "seeds", "held"),
    [
        ((0.6, 0.2), (0.25, 0.2), 3, [True, True]),
        ((0.2, 0.2), (0.3, 0.1), 3, [False, False]),
        ((0.6, 0.2), (0.25, 0.2), 2, [None, None]),
    ],
)
def test_the_page_says_which_bars_were_missed(nft, ddpo, seeds, held):
    """3 standard errors are 1.53 times half an interval; two seeds are too few."""
    found = [
        training_page.Found(
            [row(name, *values), *(row(name, *values, seed=seed) for seed in range(seeds))]
        )
        for name, values in (("nft", nft), ("ddpo", ddpo))
    ]
    checks = [*training_page._asked(found)]
    assert [check[1] for check in checks] == held
    shown = {True: "| yes |", False: "| **no** |", None: "| open |"}
    lines = training_page.answers(checks)[2:]
    assert all(shown[h] in line for h, line in zip(held, lines, strict=True))
