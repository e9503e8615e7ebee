"""Runs of the playground: shown, kept, and made again by the texts that it gives for them."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sampler
from sampler.cli import main
from sampler.config.model import ModelConfig
from sampler.core.errors import SamplerError
from sampler.rewards.ballots import read_ballot, read_votes, save_votes, write_ballot
from sampler.runs.stop import StopFlag
from sampler.ui.form import Choosing, PageInput, StrategyChoice, config_of
from sampler.ui.inputs import takes_of
from sampler.ui.pictures import drafts, finished, pending
from sampler.ui.report import report
from sampler.ui.studio import Studio
from tests import tiny
from tests.guidance.stock_hosted import (
    controlnet,
    half_mask,
    image_to_video,
    inpaint,
    picture,
    pix2pix,
)
from tests.tiny_transformers import ddim, wan

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
    return config_of(PageInput(prompts, **{"seed": 5, "n": 2, "steps": 3, **shared}), chosen,
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
        studio.run(config_of(PageInput("a", seed=1), chosen, ModelConfig()), print, StopFlag())
    with pytest.raises(SamplerError, match="is a file"):
        Studio(studio.engine, ModelConfig(), Path(__file__), studio.home)


@pytest.mark.parametrize(
    ("build", "images", "strength", "settings"),
    [(tiny.sd, {"image": False, "mask_image": False}, 0.6, "clip_skip"),
     (controlnet, {"control_image": True, "image": False, "mask_image": False}, 0.6,
      "controlnet_conditioning_scale"),
     (inpaint, {"image": True, "mask_image": True}, 1.0, "padding_mask_crop"),
     (pix2pix, {"image": False}, None, "image_guidance_scale"),
     (image_to_video, {"image": True, "last_image": False}, None, "num_frames"),
     (wan, {}, None, "num_frames")],
)  # fmt: skip
def test_the_form_follows_what_a_pipeline_takes(build, images, strength, settings):
    takes = takes_of(sampler.load(build()))
    size = build is not pix2pix  # the image decides it
    assert (takes.prompt, takes.negative, takes.size) == ("text", True, size)
    assert (takes.images, takes.strength) == (images, strength)
    assert settings in [control.name for control in takes.settings]
    shown = {control.name: control.shown for control in takes.settings}
    assert takes.given({**shown, "strength": 0.3}) == {}, "untouched controls say nothing"


def test_pipelines_without_prompts_ask_for_none(tmp_path):
    assert takes_of(sampler.load(tiny.dit())).prompt == "class"
    engine = sampler.load(ddim())
    takes = takes_of(engine)
    assert (takes.prompt, takes.negative) == ("", False)
    folder = tmp_path / "ddim"
    engine.pipeline.pipe.save_pretrained(folder)
    studio = Studio(engine, ModelConfig(path=str(folder)), tmp_path / "runs", tmp_path)
    chosen = {"sampler": StrategyChoice("ddim", {}), "guidance": StrategyChoice("none", {})}
    form = PageInput("", seed="1", n="2", steps=2, prompted=False)
    run = studio.run(config_of(form, chosen, studio.config), print_nothing, StopFlag())
    assert [record["seed"] for record in run.records] == [1, 2]


def test_a_hosted_pipeline_runs_with_its_inputs_and_settings(tmp_path):
    folder = tmp_path / "inpaint"
    inpaint().save_pretrained(folder)
    model = ModelConfig(path=str(folder))
    studio = Studio(sampler.load(folder), model, tmp_path / "runs", tmp_path)
    picture().save(tmp_path / "image.png")
    half_mask().save(tmp_path / "mask.png")
    files = {
        name: studio.kept(str(tmp_path / file))
        for name, file in (("image", "image.png"), ("mask_image", "mask.png"))
    }
    given = studio.takes.given({**files, "strength": 0.5, "padding_mask_crop": "4"})
    assert given == {**files, "strength": 0.5, "padding_mask_crop": 4}
    chosen = {"sampler": StrategyChoice("ddim", {}), "guidance": StrategyChoice("apg", {})}
    form = PageInput("a fox", seed=1, steps=4, inputs={**files, "strength": 0.5})
    run = studio.run(config_of(form, chosen, model), print_nothing, StopFlag())
    stock = studio.run_stock(run, 7.5, StopFlag())
    assert [*stock.nfe] == [4] == [record["nfe"] for record in run.records]  # two steps, twice
    (same,) = stock.similarity(run.records, run.folder)
    assert -1 < same < 1
    missing = config_of(PageInput("a fox", seed=1, steps=2), chosen, model)
    with pytest.raises((SamplerError, ValueError), match="needs the input 'image'"):
        studio.run(missing, print_nothing, StopFlag())
    with pytest.raises(SamplerError, match="not a readable image"):
        studio.kept(str(folder / "model_index.json"))


def print_nothing(look):
    pass


def test_the_best_of_several(studio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = Choosing("3", "brightness", "2").best()
    asked = config("a fox\na robot", n=1, steps=3)
    run = studio.run(asked, print_nothing, StopFlag(), best)
    assert len(run.drafts.records) == 6 and len(run.records) == 2
    for choice in run.drafts.choices:
        top = max(choice["scores"])
        assert choice["chosen"] == [choice["seeds"][choice["scores"].index(top)]]
    page = drafts(run)
    assert page.count("<figure") == 6 and page.count("chosen") == 2
    assert f"score {run.drafts.choices[0]['final_scores'][0]:.3g}" in finished(run)
    line = shlex.split(run.exports["Command line"])
    assert main([*line[1:], "-q"]) == 0
    made = pictures(run.folder / "images")
    assert same(pictures(Path("runs/best/images")), made)
    exec(run.exports["Python"], {})
    assert same(pictures(tmp_path), made)
    assert "--best-of 3 --reward brightness --draft steps=2" in run.exports["YAML"]
    table = report({"A": run}, None).splitlines()
    assert table[2].startswith("| A, drafts | 6 |") and table[3].startswith("| A | 2 |")
    assert main(["verify", str(studio.save(run)), "-q"]) == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [(("0", "brightness"), "Candidates = 0 must be a whole number"),
     (("4", " "), "needs a reward"),
     (("4", "brightness", "two"), "Draft steps = two must be")],
)  # fmt: skip
def test_wrong_fields_of_the_best_of_several(fields, sentence):
    with pytest.raises(SamplerError, match=sentence):
        Choosing(*fields).best()
    assert Choosing("", "brightness").best() is None


def test_the_stock_pipeline_beside_a_run(studio):
    chosen = {"sampler": StrategyChoice("ddim", {}),
              "guidance": StrategyChoice("cfg", {"scale": 3.0})}  # fmt: skip
    asked = config_of(PageInput("a fox\na robot", "red", seed=5, steps=4), chosen, ModelConfig())
    run = studio.run(asked, print_nothing, StopFlag())
    stock = studio.run_stock(run, 3.0, StopFlag())
    pipe = studio.engine.pipeline.pipe
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    direct = pipe(["a fox", "a robot"], negative_prompt=["red"] * 2, num_inference_steps=4,
                  guidance_scale=3.0, generator=seeds).images  # fmt: skip
    assert same([np.asarray(Image.open(p)) for p in stock.files.values()],
                [np.asarray(image) for image in direct])  # fmt: skip
    assert [*stock.nfe] == [8, 8] and stock.scheduler == type(pipe.scheduler).__name__
    ours = stock.similarity(run.records, run.folder)
    assert min(ours) > 0.98  # the model's own scheduler is DDIM
    line = report({"A": run}, stock).splitlines()[-1]
    assert line.startswith(f"| stock: {stock.scheduler}, CFG 3 | 2 | 8 | 16 |")
    stop = StopFlag()
    stop.set(2)
    assert studio.run_stock(run, 3.0, stop) is None


@pytest.mark.parametrize(
    ("form", "answers", "lines"),
    [("binary", [1, None, 0], [{"row": 0, "vote": 1}, {"row": 2, "vote": 0}]),
     ("pair", ["1", None], [{"better": 1, "worse": 0}]),
     ("rank", [["2", "0"], []], [{"rank": [2, 0]}])],
)  # fmt: skip
def test_answers_become_the_votes_of_the_command(form, answers, lines, tmp_path):
    votes = pytest.importorskip("sampler.ui.votes_tab").votes
    texts = ["a", "a", "a"] if form == "pair" else ["a", "a", "a", "b"]
    write_ballot(tmp_path / "1", form, torch.rand(len(texts), 3, 8, 8), texts)
    answers = [*answers, None] if form == "binary" else answers
    found = votes(read_ballot(tmp_path / "1"), answers)
    assert found == lines
    save_votes(tmp_path / "1", found)
    assert list(read_votes(tmp_path / "1")) == lines
