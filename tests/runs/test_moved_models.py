"""`resume` and `replay` where the files of the model have moved, or are others now."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sampler.cli import main
from tests import tiny


@pytest.fixture
def moved(tmp_path, capsys):
    """A run with a variant, a VAE and a LoRA, an image alone, and where the files are now."""
    from tests.training.test_lora import tuned

    old, new = tmp_path / "old", tmp_path / "new"
    tiny.sd(seed=3).save_pretrained(old / "model", variant="fp16")
    tiny.sd(seed=1).vae.save_pretrained(old / "vae")
    tuned(lambda: tiny.sd(seed=3), old / "lora")
    options = ["--model", old / "model", "--variant", "fp16", "--vae", old / "vae"]
    options += ["--lora", f"{old / 'lora'}:0.5", "--vae-tiling"]
    line = ["generate", "a fox", "-n", "2", "--seed", "1", "--steps", "2", "--batch-size", "1"]
    run = tmp_path / "run"
    assert (
        main([*line, "--width", "64", "--height", "64", *map(str, options), "-o", str(run), "-q"])
        == 0
    )
    old.rename(new)
    (first, second) = sorted((run / "images").iterdir())
    alone = Path(shutil.copy(first, tmp_path / "alone.png"))
    data = second.read_bytes()
    second.unlink()
    capsys.readouterr()
    now = ["--model", new / "model", "--vae", new / "vae", "--lora", f"{new / 'lora'}:0.5"]
    return run, second, data, alone, new, [str(word) for word in now]


def refused(capsys, line, *words):
    assert main([str(word) for word in line]) == 6
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.endswith(".\n")
    assert all(word in text for word in words), text


def test_resume_takes_the_places_of_moved_files(moved, capsys):
    run, image, data, _, new, now = moved
    refused(capsys, ["resume", run], "old/model does not exist", "with --model, --lora")
    for path in (new / "model/unet").glob("*.safetensors"):
        whole = path.read_bytes()
        save_file({k: v + 1 for k, v in load_file(path).items()}, path, {"format": "pt"})
        refused(capsys, ["resume", run, *now], "another model", "(different: model)")
        path.write_bytes(whole)
    weaker = [word.replace(":0.5", ":0.4") for word in now]
    refused(capsys, ["resume", run, *weaker], "(different: model.lora)")
    refused(capsys, ["resume", run, *now, "--no-vae-tiling"], "(different: model.vae_tiling)")
    assert not image.exists()
    assert main(["resume", str(run), *now, "-q"]) == 0
    assert image.read_bytes() == data


def test_replay_takes_them_too_and_knows_the_rest_from_the_record(moved, tmp_path, capsys):
    run, image, data, alone, new, now = moved
    out = tmp_path / "again.png"
    assert main(["replay", f"{run}#1", *now, "-o", str(out), "-q"]) == 0
    assert out.read_bytes() == data
    call = ["replay", alone, "-o", tmp_path / "x.png"]
    refused(capsys, call, "the option lora", "--lora, in this order with the weights 0.5")
    refused(capsys, [*call, *now[4:]], "the option vae", "with --vae")
    refused(capsys, [*call, *now[2:]], "with the variant 'fp16' of a model", "with --model")
    weaker = [word.replace(":0.5", ":0.4") for word in now]
    refused(capsys, [*call, *weaker], "different: model.lora", "weights 0.5")
    assert main([*map(str, call), *now, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] == 0


def test_a_dtype_of_auto_is_what_it_was_when_the_run_began(tmp_path, capsys, monkeypatch):
    """A run that began in float32 on a CPU, resumed where auto would be bfloat16."""
    from sampler.models import open_pipeline

    run = tmp_path / "run"
    line = ["generate", "a fox", "-n", "2", "--seed", "1", "--steps", "2", "-q"]
    assert main([*line, "--batch-size", "1", "-o", str(run)]) == 0
    capsys.readouterr()
    first, second = sorted((run / "images").iterdir())
    alone, data = Path(shutil.copy(first, tmp_path / "alone.png")), second.read_bytes()
    second.unlink()
    real = open_pipeline._dtype
    monkeypatch.setattr(
        open_pipeline, "_dtype", lambda dtype, *rest: real(dtype or torch.bfloat16, *rest)
    )
    refused(capsys, ["resume", run], "begun in float32", "bfloat16 here", "--dtype float32")
    assert main(["replay", f"{run}#1", "-o", str(tmp_path / "x.png"), "-q"]) == 0
    assert (tmp_path / "x.png").read_bytes() == data
    capsys.readouterr()
    assert main(["replay", str(alone), "-o", str(tmp_path / "y.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] == 0
    assert main(["resume", str(run), "--dtype", "float32", "-q"]) == 0
    assert second.read_bytes() == data
    refused(capsys, ["resume", run, "--repair", "--model", tmp_path], "not a diffusers pipeline")
