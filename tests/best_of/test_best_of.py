"""Best of N with drafts, in Python and on the command line."""

import json

import numpy as np
import pytest
import torch

import sampler
from sampler.cli import main
from sampler.core.errors import UsageError
from sampler.core.images import read
from sampler.evaluation.best_of import BestOf
from sampler.rewards.python import reward_from
from sampler.runs.metadata import read_record
from sampler.workers.best_of import choose, default_steps

TEXTS = ["a fox on a red background", "a dog on a blue background"]
SETTINGS = {"steps": 4, "drafts": {"steps": 2}, "best_of": 4, "reward": "brightness"}


@pytest.fixture(scope="module")
def engine():
    return sampler.load(dtype="float32")


@pytest.fixture(scope="module")
def made(engine):
    return engine.generate(TEXTS, n=2, **SETTINGS, output="tensor", batch_size=8)


def brightness(images):
    return ((images * 255).round() / 255).mean((1, 2, 3))


def test_the_best_drafts_are_run_in_full_from_their_seeds(engine, made):
    drafts = engine.generate(TEXTS, n=4, steps=2, output="tensor", batch_size=8)
    scores = brightness(drafts.images).view(2, 4)
    for k, record in enumerate(made.best_of):
        assert record["seeds"] == tuple(drafts.seeds[4 * k : 4 * k + 4])
        assert record["scores"] == pytest.approx(scores[k].tolist(), abs=1e-6)
        order = sorted(range(4), key=lambda i: -scores[k][i])[:2]
        assert record["chosen"] == [record["seeds"][i] for i in order]
        assert made.seeds[2 * k : 2 * k + 2] == record["chosen"]
        assert (record["draft_nfe"], record["final_nfe"]) == (4 * 2 * 2, 2 * 4 * 2)
        finals = brightness(made.images[2 * k : 2 * k + 2]).tolist()
        assert record["final_scores"] == pytest.approx(finals, abs=1e-6)
        assert record["order_held"] == (finals[0] >= finals[1])
    again = engine.generate(**made.config)
    assert torch.equal(again.images, made.images) and again.best_of is None
    full = engine.generate(TEXTS[0], seeds=made.seeds[:1], steps=4, output="tensor", batch_size=8)
    assert torch.allclose(full.images[0], made.images[0], atol=1e-4)


def test_ties_go_to_the_smaller_seed_and_drafts_have_a_third_of_the_steps():
    chosen = choose("a", [9, 3, 5, 4], [1.0, 2.0, 2.0, 0.0], [2, 2, 2, 2], 3)
    assert chosen.chosen == (1, 2, 0) and chosen.nfe == 8
    assert [default_steps(n) for n in (2, 3, 12, 20, 50)] == [2, 3, 4, 7, 17]


def test_a_run_folder_has_the_drafts_and_each_image_its_candidates(engine, made, tmp_path):
    out = tmp_path / "run"
    first = engine.generate(TEXTS, n=2, **SETTINGS, out=out, batch_size=8)
    assert first.seeds == made.seeds
    for k, image in enumerate(first.images):
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1) / 255
        assert torch.allclose(pixels, (made.images[k] * 255).round() / 255)
    assert [r["chosen"] for r in first.best_of] == [r["chosen"] for r in made.best_of]
    files = sorted((out / "images").iterdir())
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert len(files) == 4 and len(before) == 4 + 8
    body = read_record(files[1].read_bytes())
    assert body["best_of"]["rank"] == 1 and body["best_of"]["reward"] == "brightness"
    assert body["best_of"]["seeds"] == list(made.best_of[0]["seeds"])
    assert body["best_of"]["scores"] == pytest.approx(list(made.best_of[0]["scores"]))
    assert main(["replay", str(files[1]), "-o", str(tmp_path / "again.png")]) == 0
    assert torch.equal(read(tmp_path / "again.png"), read(files[1]))
    assert read_record((tmp_path / "again.png").read_bytes()) == body
    files[0].unlink()
    next((out / "drafts" / "images").iterdir()).unlink()
    engine.generate(TEXTS, n=2, **SETTINGS, out=out, batch_size=8)
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert set(after) == set(before) and sum(after[p] != before[p] for p in after) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"best_of": 4}, "needs a reward"),
        ({"reward": "brightness"}, "give best_of as well"),
        ({"drafts": {"steps": 2}}, "give best_of as well"),
        ({"best_of": 2, "n": 3, "reward": "brightness"}, "must lie in 1..best_of = 2"),
        ({"best_of": 2, "reward": "brightness", "drafts": {"step": 2}}, "drafts: 'step'"),
        ({"best_of": 2, "reward": "brightness", "drafts": {"steps": 1.5}}, "must be an integer"),
        ({"best_of": 2, "reward": "brigthness"}, "did you mean 'brightness'"),
        ({"best_of": 2, "reward": "votes"}, "'votes' judges whole batches"),
    ],
)
def test_what_does_not_fit_is_refused(engine, arguments, words, monkeypatch):
    monkeypatch.setattr(type(engine), "run_to_end", None)
    with pytest.raises((ValueError, UsageError), match=words):
        engine.generate("a fox", **arguments)


def test_the_command_writes_and_resumes_both_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["generate", *TEXTS, "-n", "2", "--steps", "3", "-o", "run", "--batch-size", "6"]
    line += ["--best-of", "3", "--reward", "classifier:head=background", "--draft", "steps=2"]
    assert main(line) == 0
    printed = capsys.readouterr()
    paths = printed.out.split()
    assert len(paths) == 4 and all("drafts" not in path for path in paths)
    records = json.loads((tmp_path / "run" / "best_of.json").read_text())
    drafts = [json.loads(x) for x in (tmp_path / "run/drafts/jobs.jsonl").read_text().splitlines()]
    reward = sampler.build("reward", {"name": "classifier", "head": "background"})
    for record, text in zip(records, TEXTS, strict=True):
        own = [job for job in drafts if job["prompt"] == text]
        assert record["seeds"] == [job["seed"] for job in own] and len(own) == 3
        images = [
            read(next((tmp_path / "run/drafts/images").glob(f"{j['index']:06d}*"))) for j in own
        ]
        scores = reward(torch.cat(images), [text] * 3)
        assert record["scores"] == pytest.approx(scores.tolist(), abs=1e-4)
        best = sorted(range(3), key=lambda k: -scores[k])[:2]
        assert record["chosen"] == [own[k]["seed"] for k in best]
    body = read_record((tmp_path / paths[0]).read_bytes())
    assert body["record"]["steps"] == 3 and body["record"]["seed"] == records[0]["chosen"][0]
    assert body["best_of"]["draft_nfe"] == records[0]["draft_nfe"] == 3 * 2 * 2
    (tmp_path / paths[0]).unlink()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/drafts/images").iterdir()}
    assert main(line) == 0 and (tmp_path / paths[0]).exists()
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_lines_that_differ_in_their_full_runs_alone_have_an_image_each(tmp_path, monkeypatch):
    """Their drafts are equal, and made once; the second line is another run of the same seed."""
    monkeypatch.chdir(tmp_path)
    line = {"prompt": TEXTS[0], "seed": 5}
    rows = [{**line, "steps": steps} for steps in (2, 3, 3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", "--prompts", "p.jsonl", "-o", "run", "--best-of", "2"]
    assert main([*command, "--reward", "classifier", "--draft", "steps=2"]) == 0
    records = json.loads((tmp_path / "run" / "best_of.json").read_text())
    assert [record["final_nfe"] for record in records] == [4, 6, 6]
    assert [record["seeds"] for record in records] == [[5, 6]] * 3
    first, second, third = (record["final_scores"][0] for record in records)
    assert first != second == third
    assert first == records[0]["scores"][records[0]["seeds"].index(records[0]["chosen"][0])]
    jobs = (tmp_path / "run" / "jobs.jsonl").read_text().splitlines()
    assert len(jobs) == 2


def test_the_reward_is_told_the_metadata_of_each_line(tmp_path, monkeypatch):
    """Also of equal lines, whose images are made once."""
    monkeypatch.chdir(tmp_path)
    told = []

    def wanted(images, prompts, metadata):
        told.append([entry["level"] for entry in metadata])
        return images.mean((1, 2, 3)) * float(metadata[0]["level"])

    monkeypatch.setattr(BestOf, "reward", reward_from(wanted))
    rows = [{"prompt": TEXTS[0], "seed": 5, "meta_level": level} for level in (1, -1)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", "--prompts", "p.jsonl", "-o", "run", "--best-of", "2", "--steps", "1"]
    assert main([*command, "--reward", "wanted", "--draft", "steps=2"]) == 0
    assert told == [[1, 1], [-1, -1], [1], [-1]]
    first, second = json.loads((tmp_path / "run" / "best_of.json").read_text())
    assert first["scores"] == [-score for score in second["scores"]]
    assert first["chosen"] != second["chosen"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--reward brightness -o x", "belong to --best-of"),
        ("--best-of 2 --reward brightness", "needs the run folder -o"),
        ("--best-of 2 -o x", "needs --reward NAME"),
        ("--best-of 2 --reward judge -o x", "not a reward"),
        ("--best-of 2 --reward brightness --draft steps -o x", "takes COLUMN=VALUE"),
        ("--best-of 2 --reward brightness -n 3 -o x", "is more than --best-of 2"),
        ("--best-of 2 --reward brightness --draft stpes=2 -o x", "did you mean 'steps'"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_leaves_nothing(
    options, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a fox", *options.split()]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == []
