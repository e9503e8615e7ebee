"""`sampler eval`: generation with its seeds, tables, and what it refuses."""

import json
import os

import pytest
from PIL import Image

from sampler.cli import main
from sampler.evaluation.lines import seed_of

TEXTS = ["a fox on a red background", "a dog on a blue background"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("eval"), os.getcwd()
    os.chdir(folder)
    (folder / "p.txt").write_text("\n".join(TEXTS) + "\n")
    (folder / "reversed.txt").write_text("\n".join(reversed(TEXTS)) + "\n")
    (folder / "seeds.csv").write_text("prompt,seed\na fox,3\n")
    yield folder
    os.chdir(before)


def evaluated(*arguments):
    return main(["eval", "--repeats", "2", "--steps", "2", "--scorers", "judge", *arguments])


def test_prompts_are_generated_once_and_their_order_changes_nothing(place, capsys):
    assert evaluated("--prompts", "p.txt", "-o", "run") == 0
    first = capsys.readouterr()
    assert first.out.startswith("| scorer | mean | 95 % interval |") and ".png" not in first.out
    jobs = [json.loads(line) for line in (place / "run" / "jobs.jsonl").read_text().splitlines()]
    assert [(job["prompt"], job["seed"]) for job in jobs] == [
        (text, seed_of(text, k)) for text in sorted(TEXTS) for k in range(2)
    ]
    before = (place / "run" / "eval.json").read_bytes()
    images = {p: p.stat().st_mtime_ns for p in (place / "run" / "images").iterdir()}
    assert evaluated("--prompts", "reversed.txt", "-o", "run") == 0
    again = capsys.readouterr()
    assert again.out == first.out and "All 4 images exist" in again.err
    assert (place / "run" / "eval.json").read_bytes() == before
    assert images == {p: p.stat().st_mtime_ns for p in (place / "run" / "images").iterdir()}


def test_a_run_that_exists_is_compared_in_pairs_as_events(place, capsys):
    if not (place / "run").exists():
        evaluated("--prompts", "p.txt", "-o", "run")
    capsys.readouterr()
    assert main(["eval", "run", "--against", "run", "--scorers", "judge", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    score = next(e for e in events if e.get("scorer") == "judge.concept")
    assert score["t"] == "score" and score["difference"] == 0 and score["ties"] == 2
    assert score["verdict"] == "not shown" and events[-1]["t"] == "summary"
    assert any("fewer than 20 prompts" in e.get("message", "") for e in events)


def test_long_scorings_tell_how_far_they_are(tmp_path, monkeypatch, capsys):
    for k in range(17):
        Image.new("RGB", (16, 16), (k, 0, 0)).save(tmp_path / f"{k}.png")
    assert main(["eval", str(tmp_path), "--scorers", "brightness"]) == 0
    assert "scored" not in capsys.readouterr().err
    monkeypatch.setattr("sampler.cli.evaluate.PLAIN_SECONDS", 0.0)
    assert main(["eval", str(tmp_path), "--scorers", "brightness"]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        "16 of 17 images scored", "17 of 17 images scored"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("", 2, "Give a RUN to score, or --prompts FILE and -o RUN"),
        ("--prompts p.txt", 2, "Give a RUN to score, or --prompts FILE and -o RUN"),
        ("nowhere", 2, "nowhere is not a folder"),
        (". --steps 3", 2, "--steps has no effect on images that exist"),
        (". --seed 3", 2, "--seed has no effect on images that exist"),
        (".", 2, "holds no finished image"),
        ("--prompts seeds.csv -o other", 2, "seed: an evaluation sets it itself"),
        ("--prompts p.txt -o other --scorers fid", 2, "is the name of a protocol"),
        ("--prompts p.txt -o other --set run.n=2", 2, "use --repeats"),
        ("--prompts p.txt -o other --scorers clip:path=nowhere", 6, "'nowhere' does not exist"),
        ("--prompts p.txt -o other --scorers kernel:reference=nowhere", 2, "does not exist"),
        ("--prompts p.txt -o other --scorers vendi:features=nowhere", 6, "does not exist"),
        ("--prompts p.txt -o other --against nowhere", 2, "nowhere is not a folder"),
        ("--prompts p.txt -o other --set run.seed=random", 2, "repeatable"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(
    arguments, code, words, tmp_path, place, monkeypatch, capsys
):
    for name in ("p.txt", "seeds.csv"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments.split()]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err
    assert sorted(os.listdir()) == ["p.txt", "seeds.csv"]
