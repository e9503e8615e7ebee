"""Runs of the playground: shown, kept, and made again by the texts that it gives for them."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sampler
from sampler.cli import main
from sampler.config.model import ModelConfig
from sampler.core.errors import SamplerError
from sampler.runs.stop import StopFlag
from sampler.ui.form import Form, StrategyChoice, config_of
from sampler.ui.pictures import finished, pending
from sampler.ui.studio import Studio
from tests import tiny
from tests.guidance.stock_hosted import controlnet, image_to_video, inpaint
from tests.tiny_transformers import wan

ADAPTIVE = {"rule": "{name: apg, scale: 5}", "threshold": 0.9}


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    place = tmp_path_factory.mktemp("studio")
    return Studio(sampler.load(), ModelConfig(), place / "runs", place)


def config(prompts="a fox on a green background\na <b>robot</b>", **shared):
    chosen = {
        "sampler": StrategyChoice("ddim", {"eta": 0.5}),
        "guidance": StrategyChoice("adaptive", ADAPTIVE),
    }
    return config_of(Form(prompts, **{"seed": 5, "n": 2, "steps": 3, **shared}), chosen,
                     ModelConfig())  # fmt: skip


@pytest.fixture(scope="module")
def made(studio):
    looks = []
    return studio.run(config(), looks.append, StopFlag()), looks


def pictures(folder):
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]


def same(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def test_a_run_is_looked_at_on_the_way(made):
    run, looks = made
    assert looks and looks[0].steps == 3 and len(looks[0].images) == 4
    assert looks[0].images[0].size == (64, 64)
    assert [record["status"] for record in run.records] == ["ok"] * 4
    assert all(3 <= record["nfe"] <= 6 for record in run.records) and run.seconds > 0


def test_pictures_are_shown_with_their_cost_and_nothing_of_a_prompt_is_markup(made):
    run, looks = made
    page = finished(run)
    assert page.count("<figure") == 4 and f"<b>{run.records[0]['nfe']} NFE · " in page
    assert "seed 6" in page and "&lt;b&gt;robot" in page and "<b>robot" not in page
    assert pending(4, looks[0]).count("data:image/webp") == 4
    assert "step 1 of 3" in pending(4, looks[0]) and pending(2).count("waiting") == 2


def test_a_kept_run_is_one_of_the_command_line(studio, made, capsys, tmp_path):
    folder = studio.save(made[0])
    assert folder.parent == studio.out and studio.save(made[0]) == folder
    assert not list(studio.out.glob(".save-*"))
    line = shlex.split(made[0].exports["Command line"])
    assert line[0] == "sampler" and main([*line[1:], "-o", str(folder)]) == 0
    assert "already" in capsys.readouterr().err  # the very plan
    assert main(["verify", str(folder)]) == 0
    assert main(["show", str(folder)]) == 0 and capsys.readouterr().out.count("ok") == 4
    assert main(["gallery", str(folder)]) == 0
    assert main(["replay", f"{folder}#0", "-o", str(tmp_path / "again.png")]) == 0
    assert "no pixel differs" in capsys.readouterr().err


def test_the_command_line_and_the_configuration_make_the_same_files(made, tmp_path):
    (tmp_path / "c.yaml").write_text(made[0].exports["YAML"])
    lines = {"line": shlex.split(made[0].exports["Command line"])[1:],
             "file": ["generate", "-c", str(tmp_path / "c.yaml")]}  # fmt: skip
    files = sorted((made[0].folder / "images").iterdir())
    for name, words in lines.items():
        assert main([*words, "-q", "-o", str(tmp_path / name)]) == 0
        again = sorted((tmp_path / name / "images").iterdir())
        assert [a.name for a in again] == [b.name for b in files]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again, files, strict=True))


def test_the_program_makes_the_same_images(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(made[0].exports["Python"], {})
    assert same(pictures(tmp_path), pictures(made[0].folder / "images"))


def test_a_run_that_is_told_to_stop_leaves_nothing(studio):
    before, stop = set(studio.home.iterdir()), StopFlag()
    assert studio.run(config(steps=50), lambda look: stop.set(2), stop) is None
    assert set(studio.home.iterdir()) == before


def test_what_cannot_be_made_is_a_sentence(studio):
    chosen = {"sampler": StrategyChoice("ddim", {}), "guidance": StrategyChoice("student", {})}
    with pytest.raises((SamplerError, ValueError), match="student"):
        studio.run(config_of(Form("a", seed=1), chosen, ModelConfig()), print, StopFlag())
    with pytest.raises(SamplerError, match="is a file"):
        Studio(studio.engine, ModelConfig(), Path(__file__), studio.home)


@pytest.mark.parametrize(
    ("build", "name", "strength"),
    [(tiny.sd, "image", True), (controlnet, "control_image", False), (inpaint, None, False),
     (image_to_video, "image", False), (wan, None, False)],
)  # fmt: skip
def test_the_image_that_a_pipeline_takes(build, name, strength, tmp_path):
    studio = Studio(sampler.load(build()), ModelConfig(), tmp_path, tmp_path)
    assert (studio.image_input, studio.takes_strength) == (name, strength)
