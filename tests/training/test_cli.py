"""`sampler finetune`: recipes, precedence, errors, a whole run and its resumption."""

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

import sampler
from sampler.cli import main
from sampler.cli.report import Report
from sampler.config.layers import read_file
from sampler.training.recipe import resolve_recipe

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_whole_and_tried(recipe, capsys, monkeypatch, tmp_path):
    """Each plan is told; one small update is made where the recipe needs no file from elsewhere."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert recipe.read_text().startswith("# ")
    assert resolve_recipe([read_file(recipe)]).version == 1
    code = main(["finetune", "-c", str(recipe), "--dry-run"])
    told = capsys.readouterr()
    assert "updates of" in told.out and "8 prompts" in told.out
    if "models/" in recipe.read_text():
        assert code == 6 and "models/" in told.err and told.err.strip().count("\n") == 0
    else:
        assert code == 0 and "Dry run: an update of" in told.out
    assert not list(tmp_path.glob("tmp*"))  # nothing is kept


def test_a_run_and_its_resumption(tmp_path, capsys):
    """On the bundled model: the folder is the result; a second call has nothing left to do."""
    (tmp_path / "prompts.txt").write_text("a dog on a green background\n")
    (tmp_path / "a.yaml").write_text("reward: brightness\nprompts: {file: prompts.txt}\n")
    fit = ["--set", "fit.steps=2", "--set", "fit.batch=1", "--set", "fit.checkpoint_every=1"]
    call = ["finetune", "-c", str(tmp_path / "a.yaml"), "-o", str(tmp_path / "run"), *fit]
    assert main([*call, "--trainer", "ddpo", "--updates", "1", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["t"] for e in events] == ["progress", "summary"]
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert main([*call, "--trainer", "ddpo", "--updates", "1", "-q"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "lora")


def test_columns_of_a_prompt_file_reach_the_reward(tmp_path, capsys, monkeypatch):
    """In a run and in a dry run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scored.py").write_text(
        "def by_count(images, prompts, metadata):\n    return [m['count'] for m in metadata]\n"
    )
    (tmp_path / "p.csv").write_text("prompt,meta_count\na dog,0.25\n")
    call = ["finetune", "--reward", "scored:by_count", "--allow-python", "--prompts", "p.csv"]
    call += ["--trainer", "ddpo", "--set", "fit.steps=2", "--set", "fit.batch=1", "--updates", "1"]
    call += ["--set", "fit.eval_every=1", "--set", "fit.evals=[scored:by_count]"]
    assert main([*call, "-o", "run"]) == 0
    first, update, last = map(json.loads, (tmp_path / "run" / "log.jsonl").open())
    assert first["eval_by_count"] == update["reward"] == last["reward"] == 0.25
    assert main([*call, "-o", "other", "--dry-run"]) == 0
    capsys.readouterr()


def test_one_process_of_many_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fit = ["--set", "fit.steps=2", "--set", "fit.batch=1", "--updates", "1", "--trainer", "ddpo"]
    (tmp_path / "p.txt").write_text("a dog\n")
    call = ["finetune", "--reward", "brightness", "--prompts", str(tmp_path / "p.txt"), *fit]
    for extra in ([], ["--json"]):
        assert main([*call, "-o", str(tmp_path / f"run{len(extra)}"), *extra]) == 0
        told = capsys.readouterr()
        assert told.out == told.err == ""
    assert (
        main([*call, "--trainer", "ddp"]) == 2 and "did you mean 'ddpo'" in capsys.readouterr().err
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_reward_and_time_left(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Report().updates(40) as told:
        told({"kind": "eval", "update": 10, "reward": 0.125, "drift": 0.0})
        told({"kind": "update", "update": 11, "loss": 1.0})  # gone on with; without a reward
        told({"kind": "update", "update": 12, "skipped": "The gradient is not finite."})
        told({"kind": "update", "update": 13, "reward": 0.25})
    shown = screen.getvalue()
    assert "10/40 evaluation: reward 0.125" in shown and "12/40 skipped: The gradient" in shown
    bar = next(row for row in shown.splitlines()[::-1] if "/40" in row)  # as it was at the end
    assert "13/40" in bar and "reward 0.25" in bar and re.search(r"0:\d\d:\d\d", bar)
    quiet = Terminal()
    monkeypatch.setattr("sys.stderr", quiet)
    with Report(quiet=True).updates(2) as told:
        told({"kind": "update", "update": 1, "reward": 0.5, "loss": 0.1, "grad_norm": 1.0,
              "seconds": 0.1})  # fmt: skip
    assert quiet.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rewards: brightness\n", "a.yaml:1: rewards: unknown key (did you mean 'reward'?)"),
        (
            "reward: brightnes\n",
            "a.yaml:1: Unknown reward 'brightnes' (did you mean 'brightness'?)",
        ),
        ("reward: brightness\ntrainer: {name: ddpo, clip: 1}\n", "a.yaml:2: trainer 'ddpo' has no"),
        ("reward: brightness\nfit: {update: 3}\n", "a.yaml:2: fit has no key 'update'"),
        ("reward: brightness\nfit: 3\n", "fit is a mapping"),
        ("reward: brightness\nfit: {batch: 0}\n", "batch = 0 must be an integer of at least 1"),
        ("model: {path: 3}\nreward: brightness\n", "a.yaml:1: model.path = 3"),
        ("prompts: [a dog]\n", "No reward"),
        ("reward: brightness\n", "No prompts"),
        ("reward: os:system\nprompts: [a dog]\n", "--allow-python"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, text, problem):
    (tmp_path / "a.yaml").write_text(text)
    assert main(["finetune", "-c", str(tmp_path / "a.yaml"), "-o", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err.strip()
    assert problem in told and "\n" not in told
    assert not (tmp_path / "run").exists()


def test_later_layers_win_and_strategies_are_merged(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {name: alignprop, k: 3}\nreward: brightness\n")
    (tmp_path / "b.yaml").write_text("trainer: {loss: hinge}\nfit: {seed: 3, batch: 2}\n")
    (tmp_path / "c.yaml").write_text("trainer: ddpo\nfit: {batch: 4}\n")
    files = [read_file(tmp_path / f"{name}.yaml") for name in "abc"]
    both = resolve_recipe(files[:2])
    assert both.trainer == {"name": "alignprop", "k": 3, "loss": "hinge"}
    every = resolve_recipe(files)
    assert every.trainer == {"name": "ddpo"} and every.fit == {"seed": 3, "batch": 4}


def test_a_reward_inside_a_reward_starts_anew_under_another_name(tmp_path):
    """As a rule inside a rule does in the configurations of `generate`."""
    (tmp_path / "a.yaml").write_text(
        "reward: {name: capped, value: 1.0, reward: {name: soft_compressibility, quality: 50}}\n"
    )
    (tmp_path / "b.yaml").write_text("reward: {reward: {name: brightness}}\n")
    (tmp_path / "c.yaml").write_text("reward: {reward: {quality: 60}}\n")
    a, b, c = (read_file(tmp_path / f"{name}.yaml") for name in "abc")
    inner = {"name": "brightness"}
    assert resolve_recipe([a, b]).reward == {"name": "capped", "value": 1.0, "reward": inner}
    assert resolve_recipe([a, c]).reward["reward"] == {
        "name": "soft_compressibility",
        "quality": 60,
    }


def test_generate_with_an_adapter(tmp_path, capsys):
    """Its weight is part of what a run is: 0 gives the model's own images, 1 others."""
    from tests.training.test_lora import tuned

    tuned(sampler.load, tmp_path / "lora")
    call = ["generate", "a dog", "--steps", "2", "--seed", "1", "-q"]
    pixels = {}
    for weight in (None, "0", "1"):
        out = tmp_path / f"run{weight}"
        lora = [] if weight is None else ["--lora", f"{tmp_path / 'lora'}:{weight}"]
        assert main([*call, *lora, "-o", str(out)]) == 0, capsys.readouterr().err
        (image,) = (out / "images").glob("*.png")
        pixels[weight] = list(Image.open(image).getdata())
    assert pixels[None] == pixels["0"] != pixels["1"]
    again = [*call, "-o", str(tmp_path / "run1")]
    assert main([*again, "--lora", f"{tmp_path / 'lora'}:0.5"]) == 4
    assert main([*again, "--lora", str(tmp_path / "nothing")]) == 6
    assert "does not exist" in capsys.readouterr().err


def test_replay_with_an_adapter(tmp_path, capsys):
    """From its run bit-equal; from the image alone with the adapters given again, or refused."""
    from tests.training.test_lora import tuned

    tuned(sampler.load, tmp_path / "lora")
    lora = ["--lora", f"{tmp_path / 'lora'}:0.5"]
    out = tmp_path / "run"
    call = ["generate", "a dog", "--steps", "2", "--seed", "1", "-q", *lora, "-o", str(out)]
    assert main(call) == 0
    (image,) = (out / "images").glob("*.png")
    for what in (f"{out}#0", str(image)):
        again = tmp_path / "again.png"
        assert main(["replay", what, "-o", str(again)]) == 0, capsys.readouterr().err
        assert again.read_bytes() == image.read_bytes()
        again.unlink()
    alone = tmp_path / "alone.png"
    alone.write_bytes(image.read_bytes())
    call = ["replay", str(alone), "-o", str(tmp_path / "x.png")]
    assert main(call) == 6 and "give its file or folder with --lora" in capsys.readouterr().err
    assert main([*call, "--lora", str(tmp_path / "lora")]) == 6, "another weight"
    capsys.readouterr()
    assert main([*call, *lora, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] == 0
