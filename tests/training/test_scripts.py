"""The distillation, the study and the benchmark scripts, in short forms."""

import csv
import json
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sampler
from sampler.bundled import FOLDER
from sampler.models import few_step
from sampler.pipelines.stable_diffusion import scale_embedding
from sampler.types import Span
from scripts.bench import finetune as bench_finetune
from scripts.bundled import distill_lcm
from scripts.bundled.emoji_data import EmojiData, draw_sprites
from scripts.bundled.networks import load_pipeline
from scripts.bundled.tasks import Latents
from scripts.study import finetune as study_finetune
from scripts.study.finetune_summary import crossing, summary

TRAIN = ["--images", "8", "--batch-size", "2", "--latents", "64", "--checkpoint-steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def float32():
    """Without autocast: where bfloat16 is emulated, the trainings would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())
        yield


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return draw_sprites(tmp_path_factory.mktemp("shapes") / "sprites.npz")


@pytest.fixture(scope="module")
def task(sprites, tmp_path_factory):
    pipe = load_pipeline()
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    cache = Latents(EmojiData(sprites), pipe.vae, 64, 0, path)
    return distill_lcm.ConsistencyTask(cache, pipe, 4, 0)


@torch.no_grad()
def test_a_student_starts_as_its_teacher_whatever_the_scale(task):
    x, context = torch.randn(2, 4, 16, 16), task.context(["a dog", "a cat"])
    for scale in (1.0, 4.0):
        told = scale_embedding(torch.full((2,), scale), distill_lcm.EMBEDDING)
        mine = task.modules["unet"](x, 400, context, timestep_cond=told).sample
        torch.testing.assert_close(mine, task.teacher(x, 400, context).sample)


@torch.no_grad()
def test_the_teachers_step_is_guided_ddim(task):
    """Against the package's own rule and sampler, up to the autocast's rounding."""
    engine = sampler.load()
    texts, x = ["a dog on red", ""], torch.randn(2, 4, 16, 16)
    scale, cond = 3.0, engine.pipeline.encode(texts, ["", ""], True, (64, 64))
    for n in (0, 3, distill_lcm.LEVELS - 1):
        rows = torch.tensor([n, n])
        found = task.taught(x, rows, task.context(texts), torch.full((2,), scale))
        now = engine.pipeline.schedule.level(int(task.times[n]))
        after = sampler.Level(0, 1.0, 0.0)
        if n + 1 < distill_lcm.LEVELS:
            after = engine.pipeline.schedule.level(int(task.times[n + 1]))
        rule, method = sampler.build("guidance", {"name": "cfg", "scale": scale}), "ddim"
        snapshot, _ = engine.start(x, (now, after), cond, method, rule)
        pred = engine.predict(snapshot, Span(0, now, after, 1), cond, rule)[0]
        move = sampler.build("sampler", method).step(x, pred, Span(0, now, after, 1), ())
        wanted = sampler.settle(move.mean)
        assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    # the last level's target is the teacher's own estimate of x0
    assert task.level(torch.tensor([distill_lcm.LEVELS]))[1] == 0


@pytest.mark.slow
def test_training_resumes_bit_for_bit_and_is_packed(sprites, tmp_path, monkeypatch):
    def call(*arguments):
        return CliRunner().invoke(distill_lcm.app, list(map(str, arguments)))

    assert call("train", "--data", sprites, "--out", tmp_path / "whole", *TRAIN).exit_code == 0
    plain = distill_lcm.ConsistencyTask.loss

    def breaking(self, step):
        if step == 2:
            raise KeyboardInterrupt
        return plain(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(distill_lcm.ConsistencyTask, "loss", breaking)
        assert call("train", "--data", sprites, "--out", tmp_path / "cut", *TRAIN).exit_code
    assert not (tmp_path / "cut" / "student.safetensors").exists()
    assert call("train", "--data", sprites, "--out", tmp_path / "cut", *TRAIN).exit_code == 0
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)

    assert call("pack", "--out", tmp_path / "cut").exit_code == 0
    folder = tmp_path / "cut" / "lcm"
    assert (folder / "student.safetensors").stat().st_size < 6 * 2**20
    teacher = load_pipeline().unet
    student = few_step.network(teacher, folder).state_dict()
    before = teacher.state_dict()
    moved = [k for k in before if not torch.equal(one[k], before[k])]
    assert len(moved) > 50
    for key in student:
        change = one[key] - before.get(key, 0)
        step = change.flatten(1).abs().amax(1).max() / 127 if change.ndim > 1 else change.abs()
        assert ((student[key] - one[key]).abs() <= 0.51 * step + 1e-3 * change.abs() + 1e-7).all()
    made = few_step.pipeline(load_pipeline(), folder)
    engine = sampler.load(made)
    assert engine.generate("a dog", steps=2, output="latent").nfe == [2]
    report = call("report", "--out", tmp_path / "cut", "--images", "2")
    assert report.exit_code == 0 and (tmp_path / "cut" / "sheet.png").is_file()
    figures = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert list(figures["steps"]) == ["1", "2", "4", "8"]
    assert all(0 <= f["concept"] <= 1 and f["images"] == 2 for f in figures["steps"].values())


@pytest.mark.slow
def test_the_study_trains_sweeps_and_plots(tmp_path, monkeypatch):
    runs, figures = tmp_path / "runs", tmp_path / "figures"
    one = ["--seeds", "0", "--trainers", "alignprop", "--rewards", "classifier"]

    def call(task, *arguments):
        given = [task, "--out", runs, "--prompts", "2", "--images", "2", *arguments]
        monkeypatch.setattr(sys, "argv", ["study_finetune.py", *map(str, given)])
        study_finetune.main()

    for _ in range(2):  # the second call finds all of it done
        call("train", *one, "--updates", "1")
    rows = study_finetune.read(runs / "finetune_curves.csv")
    assert [(r["update"], r["images"]) for r in rows] == [("0", "0"), ("1", "8")]
    assert float(rows[1]["cpu_seconds"]) > 0 and float(rows[1]["drift"]) > 0
    log = (runs / "classifier-alignprop-0" / "log.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "update" for line in log) == 1
    for _ in range(2):
        call("sweep", *one)
    mix = study_finetune.read(runs / "finetune_mix.csv")
    assert [float(r["weight"]) for r in mix] == [0, 0.25, 0.5, 0.75, 1]
    assert float(mix[0]["drift"]) == 0 < float(mix[2]["drift"]) < float(mix[4]["drift"])
    call("plot", "--figures", figures)
    names = {p.name for p in figures.iterdir()}
    kinds = ("curves.csv", "mix.csv", "summary.csv", "curves.png", "strips.png")
    assert names == {f"finetune_{kind}" for kind in kinds}


def test_the_summary_finds_where_curves_cross():
    def line(trainer, values, step, seconds):
        return [
            {"reward": "r", "trainer": trainer, "seed": "0", "value": v, "images": i * step,
             "cpu_seconds": i * seconds, "drift": 0.1 * i}
            for i, v in enumerate(values)
        ]  # fmt: skip

    curves = line("ddpo", [0.0, 1.0, 2.0], 100, 10) + line("alignprop", [0.0, 4.0], 20, 2)
    curves += line("rlcm", [-5.0, -4.0, -2.0], 50, 1)
    mix = [{"reward": "r", "trainer": "ddpo", "weight": 1, "value": 2.0, "frechet": 9.0}]
    mix += [
        {"reward": "r", "trainer": "alignprop", "weight": w, "value": 4 * w, "frechet": 5 + w}
        for w in (0, 0.25, 0.75, 1)
    ]
    (row,) = summary(curves, mix)
    assert (row["ddpo_images"], row["alignprop_images"], row["images_share"]) == (200, 10, 0.05)
    assert row["cpu_share_alignprop"] == pytest.approx(1 / 20)
    assert row["rlcm_cpu_seconds"] == pytest.approx(1.5)  # a gain of 2 over its own start
    assert row["alignprop_drift"] == pytest.approx(0.05)
    assert (row["ddpo_frechet"], row["alignprop_frechet"]) == (9.0, pytest.approx(5.5))
    for row in curves[:3]:  # DDPO gains nothing: there is no mark to reach
        row["value"] = 0.0
    assert "images_share" not in summary(curves, [])[0]
    assert crossing([0, 1], [0, 1], 2) is None and crossing([3, 4], [5, 6], 5) == 3


def test_measures_are_replaced_by_name(tmp_path):
    bench_finetune.record(tmp_path, [("a", 1.0, "s"), ("b", 2.0, "s")])
    bench_finetune.record(tmp_path, [("b", 0.123456, "s"), ("c", 3.0, "MiB")])
    with (tmp_path / "finetune_bench.csv").open() as file:
        rows = [row[:3] for row in csv.reader(file)]
    assert rows[1:] == [["a", "1", "s"], ["b", "0.1235", "s"], ["c", "3", "MiB"]]


@pytest.mark.skipif(not (FOLDER / "lcm").is_dir(), reason="the student is not in the package")
def test_the_bundled_student_is_small_fast_and_knows_what_it_draws():
    from sampler.bundled import classifier, measures, prompts

    size = sum(p.stat().st_size for p in few_step.STUDENT.iterdir())
    assert size < 6 * 2**20
    engine = sampler.load("bundled-lcm")
    assert engine.sampler.name == "consistency" and engine.guidance.name == "embedded"
    listed = prompts(128)[::8]
    made = engine.generate(
        [p.text for p in listed], seeds=list(range(16)), steps=4, batch_size=16, output="tensor"
    )
    assert made.nfe == [4] * 16
    model = classifier.load()
    found = measures.agreement(model, measures.extracted_features(model, made.images), listed)
    assert found["background"] >= 0.9 and found["concept"] >= 0.5
    far = engine.generate([p.text for p in listed], seeds=list(range(16)), steps=9 - 1)
    assert len(far.images) == 16
    with pytest.raises(ValueError, match=r"1\.\.8"):
        engine.generate("a dog", steps=9)


def test_the_study_of_time_laws_moves_the_words_and_leaves_concepts_out():
    """A right picture has the background that is shown, five places before its word."""
    from sampler.bundled import concepts
    from scripts.study import times

    assert times.caption("dog", 0) == "a dog on a green background"
    named = [text.split(" on a ")[0].removeprefix("a ") for text in times.left_out(48)]
    assert len(set(named)) == 32 and {concepts().index(name) % 4 for name in named} == {0}
    white = torch.full((1, 3, 64, 64), 0.96)
    captions = ["a dog on a green background", "a dog on a white background"]
    assert times.Backgrounds()(white.expand(2, -1, -1, -1), captions).tolist() == [1.0, 0.0]
