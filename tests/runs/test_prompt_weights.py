"""Prompt weights: how they are read, applied to encodings, and noted where they are not."""

import importlib.util
import json

import pytest
import torch

import sampler
from sampler.cli import main
from sampler.core.prompt_weights import UNREAD, has_weights, weighted
from sampler.pipelines.prompt_weights import PromptWeights
from tests import tiny
from tests.runs.stub import RawLine, make


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a fox", [("a fox", 1)]),
        ("a (red:1.5) fox", [("a ", 1), ("red", 1.5), (" fox", 1)]),
        ("a (red) [fox]", [("a ", 1), ("red", 1.1), (" ", 1), ("fox", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("((red) fox: big: .5 )", [("red", 1.1 * 0.5), (" fox: big", 0.5)]),
        (r"\(red\) \\ 1:2", [(r"(red) \ 1:2", 1)]),
        ("a (red", [("a ", 1), ("red", 1.1)]),
        ("red) :1.2) a]", [("red) :1.2) a]", 1)]),
        ("", [("", 1)]),
    ],
)
def test_weights_of_a_prompt(text, pieces):
    found = weighted(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_explicit_weights_are_told_from_brackets():
    assert has_weights(["a", "a (red:1.5) fox"]) and has_weights(["(a: 1 )"])
    assert not has_weights(["a (red) fox", "ratio 1:2", r"\(red:1.5\)", "[a:b:0.5]"])


def test_weights_that_are_not_applied_are_noted_in_the_record(tmp_path):
    table = [RawLine("f:1", {"prompt": "a (red:1.5) fox"}), RawLine("f:2", {"prompt": "a (fox)"}),
             RawLine("f:3", {"prompt": "a", "negative_prompt": "(b:0.5)"})]  # fmt: skip
    run, tally = make(tmp_path / "run", table)
    entries = {job.index: run.results().entries[job.key]["warnings"] for job in run.jobs()}
    assert entries == {0: [UNREAD], 1: [], 2: [UNREAD]} and tally.done == 3


def encoded(engine, prompt, negative=""):
    cond = engine.pipeline.encode([prompt], [negative], True, (32, 32))
    return cond.cond["encoder_hidden_states"], cond.uncond["encoder_hidden_states"]


@pytest.fixture(scope="module", params=[tiny.sd, tiny.sdxl])
def pair(request):
    pytest.importorskip("compel")
    pipe = request.param()
    return sampler.load(pipe), sampler.load(pipe, prompt_weights=True)


def test_a_weight_moves_its_tokens_away_from_the_empty_prompt(pair):
    """z = z_0 + w (z - z_0) at the tokens of weight w, and z elsewhere."""
    plain, engine = pair
    z, z0 = encoded(plain, "a red fox")[0], encoded(plain, " ")[0]
    tokenizer = plain.pipeline.pipe.tokenizer
    first, red = (len(tokenizer.tokenize(text)) for text in ("a", "red"))
    expected = z.clone()
    rows = slice(1 + first, 1 + first + red)
    expected[:, rows] = z0[:, rows] + 1.5 * (z[:, rows] - z0[:, rows])
    assert torch.allclose(encoded(engine, "a (red:1.5) fox")[0], expected, atol=1e-5)
    assert torch.allclose(encoded(engine, "b", "a (red:1.5) fox")[1], expected, atol=1e-5)
    less = encoded(engine, "a (red:0.5) fox")[0]
    assert not torch.allclose(less, z, atol=1e-3) and less.isfinite().all()


def test_prompts_without_weights_are_encoded_as_ever(pair):
    plain, engine = pair
    for text, same in (("a fox", "a fox"), (r"a \(red\) fox", "a (red) fox"), ("(a:1)", "a")):
        assert torch.equal(encoded(engine, text)[0], encoded(plain, same)[0])
    pooled = [
        one.pipeline.encode([text], [""], True, (32, 32)).cond.get("added_cond_kwargs", {})
        for one, text in ((engine, "a (red:1.5) fox"), (plain, "a red fox"))
    ]
    assert all(torch.equal(pooled[0][name], pooled[1][name]) for name in pooled[0])


def test_models_and_installations_that_cannot_weigh_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="prompt_weights has no effect on PixArtSigmaPipeline"):
        sampler.load(tiny.pixart(), prompt_weights=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the extra 'weights'"):
        PromptWeights(tiny.sd())


def test_weights_on_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("compel")
    monkeypatch.chdir(tmp_path)
    prompt = "a (red:1.8) apple on a blue background"
    line = ["generate", prompt, "--steps", "1", "--seed", "1", "--batch-size", "1"]
    assert main([*line, "-o", "plain"]) == 0 and UNREAD in capsys.readouterr().err
    assert main([*line, "-o", "run", "--prompt-weights"]) == 0
    assert UNREAD not in capsys.readouterr().err
    images = [next((tmp_path / run / "images").iterdir()) for run in ("plain", "run")]
    assert images[0].name != images[1].name and images[0].read_bytes() != images[1].read_bytes()
    entry = json.loads((tmp_path / "run/journal.jsonl").read_text().splitlines()[-1])
    assert entry["warnings"] == []
    assert main(["replay", "run#0", "-o", "again.png"]) == 0
    assert "no pixel differs" in capsys.readouterr().err
