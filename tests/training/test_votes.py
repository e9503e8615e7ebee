"""Rewards of people: ballots, scores of votes, resumption, what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize

import sampler
from sampler.cli.commands import run as command
from sampler.core import durable
from sampler.core.errors import IncompleteError
from sampler.rewards import ballots, votes
from tests import tiny
from tests.training import world

NFT = {"name": "nft", "group_size": 4, "times": 1, "kl": 0.0}
QUICK = {"batch": 4, "guidance": "none", "checkpoint_every": 1}


def vote(folder, errors=0.0, skip=()):
    """A voter for bright images, wrong with a probability, who leaves out some rows."""
    ballot, lines = ballots.read_ballot(folder), []
    values = [np.asarray(Image.open(folder / e["file"])).mean() for e in ballot["images"]]
    draw = np.random.default_rng(int(folder.name))
    for row, value in enumerate(values):
        if row not in skip:
            good = bool(value > np.median(values)) != bool(draw.random() < errors)
            lines.append({"row": row, "vote": int(good)})
    ballots.save_votes(folder, lines)


@pytest.fixture
def voter(monkeypatch):
    """Vote where a run waits, in place of the pause."""
    folders = []

    def act(seconds):
        (folder,) = ballots.open_ballots(folders[0])
        vote(folder)

    monkeypatch.setattr(votes.time, "sleep", act)
    return folders


@pytest.mark.filterwarnings("ignore:Waiting for votes")
def test_a_run_that_ends_at_each_ballot_is_the_one_that_waits(tmp_path, voter):
    """Bit for bit; a ballot that is there is kept, with its votes."""
    engine = world.engine()
    waiting, ending = {"name": "votes"}, {"name": "votes", "wait": False}
    voter.append(tmp_path / "whole")
    report = world.tune(engine, tmp_path / "whole", NFT, waiting, updates=3, **QUICK)
    assert [r["voted"] for r in report.log] == [4, 4, 4] and report.log[0]["reward"] == 0.5
    out, ends = tmp_path / "cut", 0
    while True:
        try:
            world.tune(engine, out, NFT, ending, updates=3, **QUICK)
            break
        except IncompleteError as error:
            assert "has no votes yet" in str(error)
            ends += 1
            vote(ballots.open_ballots(out)[0])
    assert ends == 3 and world.curve(out) == world.curve(tmp_path / "whole")
    assert world.weights(out) == world.weights(tmp_path / "whole")
    names = sorted(path.name for path in (out / "votes" / "000002").iterdir())
    assert names == [*(f"{row:06d}.png" for row in range(4)), "ballot.json", "votes.jsonl"]


@pytest.mark.parametrize("trainer", ["nft", "awm", "dpo"])
def test_rows_without_a_vote_have_weight_0(tmp_path, trainer, monkeypatch):
    """A group of which nobody judged two images has no gradient."""
    spec = {**world.TRAINERS[trainer], "passes": 1}
    skipped = []
    monkeypatch.setattr(
        votes.time, "sleep", lambda _: vote(ballots.open_ballots(tmp_path)[0], skip=skipped)
    )
    skipped += [0]
    with pytest.warns(UserWarning, match="Waiting for votes"):
        log = world.tune(
            world.engine(), tmp_path, spec, {"name": "votes"}, updates=1, weight_decay=0.0, ema=0,
            guidance="none",
        ).log  # fmt: skip
    assert log[0]["voted"] == 1 and log[0]["grad_norm"] < 1e-3
    assert not any(np.frombuffer(v, np.float32).any() for k, v in up(tmp_path) if "lora_B" in k)


def up(out):
    return [(k, v) for k, v in world.weights(out).items() if "up" in k or "lora_B" in k]


def test_the_bradley_terry_scores_are_the_maximum():
    wins = [(0, 1), (0, 2), (1, 2), (2, 1), (4, 5)]

    def loss(s):
        return sum(np.log1p(np.exp(s[b] - s[a])) for a, b in wins) + 0.05 * (s**2).sum()

    wanted = minimize(loss, np.zeros(6), tol=1e-12).x
    np.testing.assert_allclose(votes.bradley_terry(wins, 6), wanted, atol=1e-6)
    assert votes.bradley_terry([], 2).tolist() == [0, 0]


def test_forms_of_votes(tmp_path):
    images, prompts = torch.rand(4, 3, 16, 16), ["a", "a", "b", "b"]
    for form, lines, wanted in (
        ("binary", [{"row": 1, "vote": 1}, {"row": 0, "vote": -2.5}], [-2.5, 1, None, None]),
        ("pair", [{"better": 1, "worse": 0}], [-1, 1, None, None]),
        ("rank", [{"rank": [3, 2]}], [None, None, -1, 1]),
    ):
        reward, out = votes.Votes(form=form, wait=False), tmp_path / form
        with pytest.raises(IncompleteError, match="no votes yet"):
            reward.judge(images, prompts, out, 12, True)
        ballots.save_votes(out / "votes" / "000012", lines)
        found = reward.judge(images, prompts, out, 12, True)
        for ours, expected in zip(found, wanted, strict=True):
            if expected is None:
                assert math.isnan(ours)
            elif form == "binary":
                assert ours == expected
            else:  # of one comparison: s = sigmoid(-2 s)/ridge
                assert ours * expected == pytest.approx(10 / (1 + math.exp(2 * ours * expected)))
    with pytest.raises(sampler.SamplerError, match="images of other prompts"):
        votes.Votes(form="rank").judge(images, ["a"] * 4, tmp_path / "rank", 12, True)


def test_a_ballot_that_a_killed_writer_left_is_not_voted_on(tmp_path):
    for name in ("000002", f"{durable.TEMPORARY}12-0"):
        ballots.write_ballot(tmp_path / "votes" / name, "binary", torch.rand(1, 3, 16, 16), ["a"])
    assert ballots.open_ballots(tmp_path) == [tmp_path / "votes" / "000002"]


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("binary", {"row": 4, "vote": 1}),
        ("binary", {"row": 1, "vote": "good"}),
        ("binary", {"row": 1}),
        ("pair", {"better": 1, "worse": 1}),
        ("pair", {"row": 1, "vote": 1}),
        ("rank", {"rank": [1]}),
        ("rank", {"rank": [1, True]}),
    ],
)
def test_a_wrong_vote_is_one_sentence(tmp_path, form, line):
    ballots.write_ballot(tmp_path / "1", form, torch.rand(4, 3, 16, 16), ["a"] * 4)
    with pytest.raises(sampler.SamplerError, match=f"votes.jsonl:1: a vote of form '{form}'") as e:
        ballots.save_votes(tmp_path / "1", [line])
    assert "\n" not in str(e.value) and not (tmp_path / "1" / ballots.VOTES).exists()


@pytest.mark.parametrize(
    ("form", "answers", "lines"),
    [
        ("binary", "1\n7\n0\n\n1\n", [(0, 1), (1, 0), (3, 1)]),
        ("pair", "0\n3\n", [(0, 1), (3, 2)]),
        ("rank", "1 0\n3 3\n\n", [[1, 0]]),
    ],
)
def test_the_command_asks_and_writes(tmp_path, form, answers, lines, monkeypatch, capsys):
    """An answer that is not allowed is asked for again; Enter leaves one out."""
    folder = tmp_path / "votes" / "000001"
    ballots.write_ballot(folder, form, torch.rand(4, 3, 16, 16), ["a", "a", "b", "b"])
    given = iter(answers.split("\n"))
    monkeypatch.setattr("typer.prompt", lambda *arguments, **options: next(given))
    assert command(["vote", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "votes.jsonl")
    found = [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]
    assert [
        list(vote.values())[0] if form == "rank" else tuple(vote.values()) for vote in found
    ] == lines
    assert command(["vote", str(tmp_path)]) == 4
    assert "no images awaiting votes" in capsys.readouterr().err


def test_nobody_is_asked_about_pairs_that_are_judged(tmp_path, monkeypatch):
    pairs = "sampler.training.matching.pair_files"
    monkeypatch.setattr(f"{pairs}.read_pairs", lambda data: ["a dog"])
    monkeypatch.setattr(f"{pairs}.files_of", lambda *given: ())
    spec = {"name": "dpo", "data": "pairs"}
    with pytest.raises(ValueError, match="judged already, so that 'votes' would never be asked"):
        sampler.finetune(world.engine(), spec, "votes", (), tmp_path / "a", settings=world.SHORT)


def test_what_cannot_be_judged_is_one_sentence(tmp_path):
    engine = world.engine()
    for trainer, reward, settings, problem in (
        ("grpo", "votes", {}, "grpo scores images one by one, and 'votes' judges whole batches"),
        ("nft", "votes", {"stop_reward": 1.0, "eval_every": 1}, "need a reward of single images"),
        ("nft", {"name": "sum", "rewards": ["votes"]}, {}, "people vote on whole batches"),
    ):
        with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
            world.tune(engine, tmp_path, trainer, reward, updates=1, **settings)
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Waiting for votes")
def test_it_learns_from_a_voter_who_errs(tmp_path, monkeypatch):
    """One vote in ten is wrong; more than 3 standard errors, of the same prompts and seeds."""
    engine = world.engine(tiny.sd, tiny_vae=True)
    monkeypatch.setattr(
        votes.time, "sleep", lambda _: vote(ballots.open_ballots(tmp_path)[0], errors=0.1)
    )
    options = {"batch": 12, "steps": 3, "lr": 1e-2, "guidance": "none", "rank": 4, "alpha": 8}
    spec = {**NFT, "times": 2}
    world.tune(engine, tmp_path, spec, {"name": "votes"}, updates=18, **options)
    scores = []
    for _ in range(2):
        made = engine.generate(
            world.PROMPTS * 6, seeds=list(range(18)), steps=3, height=16, width=16,
            sampler={"name": "ab", "order": 2}, guidance="none", output="tensor",
        )  # fmt: skip
        scores.append(made.images.mean((1, 2, 3)))
        if len(scores) == 1:
            sampler.models.lora.load_lora(engine, tmp_path)
    gain = scores[1] - scores[0]
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
