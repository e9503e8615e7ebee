"""The trainer of the bundled model, on drawn shapes."""

import json
import os
import signal

import pytest
import torch
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from sampler.bundled import FOLDER, judge
from scripts.bundled import checkpoint as bundled_checkpoint
from scripts.bundled import tasks, train_judge
from scripts.bundled import train as train_bundled
from scripts.bundled.classifier_task import ClassifierTask
from scripts.bundled.emoji_data import EmojiData, draw_sprites
from scripts.bundled.loop import Plan, averaged, train
from scripts.bundled.networks import (
    WEAK_WIDTHS,
    load_pipeline,
    new_scheduler,
    new_text_encoder,
    new_unet,
    new_vae,
)
from scripts.bundled.sd3_task import (
    T5_LENGTH,
    RepeatedTokenAttention,
    Sd3Task,
    assembled_sd3,
    new_transformer,
)
from scripts.bundled.sd3_task import new_text_encoder as new_sd3_text_encoder
from scripts.bundled.tasks import Latents, UnetTask, VaeTask
from scripts.bundled.tokenizer import tokenizer_for
from tests.runs.test_kill import in_child


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return draw_sprites(tmp_path_factory.mktemp("shapes") / "sprites.npz")


@pytest.fixture(scope="module")
def data(sprites):
    return EmojiData(sprites)


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def test_the_learning_rate_warms_up_holds_and_ends_at_its_floor():
    plan = Plan(1.0, images=100, batch_size=10, warmup=4, hold=0.5, floor=0.1, cosine=False)
    assert plan.steps == 10
    assert [plan.rate(step, 0) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert plan.rate(9, 0.5) == 1
    assert plan.rate(9, 0.75) == pytest.approx(0.55)
    assert plan.rate(9, 1.0) == pytest.approx(0.1)
    timed = Plan(1.0, minutes=2)
    assert timed.fraction(10**6, 30) == 0.25 and timed.fraction(0, 1000) == 1


def test_the_average_starts_at_the_first_weights_and_warms_up():
    modules = nn.ModuleDict({"layer": nn.Linear(1, 1, bias=False)})
    weight = modules["layer"].weight.data
    ema = averaged(modules, 0.9)
    weight.fill_(1.0)
    ema.update_parameters(modules)
    weight.fill_(3.0)
    ema.update_parameters(modules)
    # Decay (1 + 1) / (10 + 1) at the second update.
    assert ema.module["layer"].weight.item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)


def unet_task(data, folder):
    torch.manual_seed(3)
    tokenizer = tokenizer_for(data, FOLDER / "pipeline" / "tokenizer")
    latents = Latents(data, new_vae().eval(), 64, 0, folder / "latents.safetensors")
    unet, text = new_unet(WEAK_WIDTHS), new_text_encoder(tokenizer)
    return UnetTask(latents, unet, text, tokenizer, 2, 0)


def sd3_parts(tokenizer):
    encoders = {
        name: new_sd3_text_encoder(tokenizer) for name in ("text_encoder", "text_encoder_2")
    }
    return {"transformer": new_transformer(), **encoders}


def sd3_task(data, folder):
    torch.manual_seed(3)
    teacher = load_pipeline()
    latents = Latents(data, teacher.vae, 64, 0, folder / "latents.safetensors")
    parts = sd3_parts(teacher.tokenizer)
    parts["transformer"].set_attn_processor(RepeatedTokenAttention())
    return Sd3Task(latents, parts, teacher, teacher.tokenizer, 2, 0)


def test_one_token_stands_for_the_256_of_the_stock_pipeline():
    torch.manual_seed(0)
    tokenizer = load_pipeline().tokenizer
    parts = sd3_parts(tokenizer)
    network = parts["transformer"]
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    pipe = assembled_sd3(parts, new_vae(), tokenizer)
    states, _, pooled, _ = pipe.encode_prompt(
        ["a red apple"], None, None, do_classifier_free_guidance=False
    )
    x, time = torch.randn(1, 4, 16, 16), torch.tensor([300.0])
    with torch.no_grad():
        stock = network(x, states, pooled, time).sample
        assert states.shape[1] == 16 + T5_LENGTH and not states[:, 16:].any()
        for count, same in ((T5_LENGTH, True), (1, False)):
            network.set_attn_processor(RepeatedTokenAttention(count))
            one = network(x, states[:, :17], pooled, time).sample
            assert torch.allclose(one, stock, atol=1e-3) is same


def test_the_target_is_the_velocity_of_the_bundled_model(data, tmp_path):
    task = sd3_task(data, tmp_path)
    sigma = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None]
    clean, captions = task.latents.batch(3, 5)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    ids = task.tokens(captions)
    target = task.target((1 - sigma) * clean + sigma * noise, sigma, ids)
    # At the same noise level the teacher's sample is x / sqrt((1 - sigma)^2 + sigma^2).
    bar = ((1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)).flatten()
    table = new_scheduler().alphas_cumprod
    for i in range(3):
        t = int((table - bar[i]).abs().argmin())
        alpha, s = table[t].sqrt(), (1 - table[t]).sqrt()
        state = task.view.pipe.text_encoder(ids[i : i + 1])[0]
        x = alpha * clean[i : i + 1] + s * noise[i : i + 1]
        v = task.view.pipe.unet(x, t, state).sample
        eps, x0 = s * x + alpha * v, alpha * x - s * v
        assert torch.allclose(target[i : i + 1], eps - x0, atol=0.02)


def vae_task(data, folder):
    torch.manual_seed(3)
    return VaeTask(data, new_vae(), 2, 0)


def classifier_task(data, folder):
    return ClassifierTask(data, 2, 0)


def judge_task(data, folder):
    return ClassifierTask(data, 2, 11, judge.Judge, autocast=False)


@pytest.mark.parametrize("make", [vae_task, classifier_task, judge_task, unet_task, sd3_task])
def test_an_interrupted_run_resumes_bit_for_bit(make, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "GRID", 2)
    plan = Plan(1e-3, images=12, batch_size=2, warmup=2, checkpoint_steps=2)
    whole = train(make(data, tmp_path), plan, tmp_path / "whole")

    def fail(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(data, tmp_path), plan, tmp_path / "cut", after_step=fail)
    (tmp_path / "cut" / "checkpoint.tmp").mkdir()  # a save that was cut short
    resumed = train(make(data, tmp_path), plan, tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert len(losses(tmp_path / "whole")) == 6
    assert len({loss for _, loss in losses(tmp_path / "whole")}) == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    kept = [path for path in (tmp_path / "cut").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} <= {".safetensors", ".json", ".jsonl", ".png"}
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint*")] == ["checkpoint-00000006"]


def test_a_killed_process_goes_on_from_its_last_checkpoint(sprites, data, tmp_path):
    """Killed while it writes its second checkpoint."""
    plan = Plan(2e-3, images=30 * 8, batch_size=8, weight_decay=0.05, checkpoint_steps=10)
    arguments = ["classifier", "--data", sprites, "--out", tmp_path, "--images", plan.images]
    arguments += ["--batch-size", 8, "--checkpoint-steps", 10]

    def command():
        left, real = [9], bundled_checkpoint._flush  # six of a checkpoint, and half of the next

        def flush(path):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path)

        bundled_checkpoint._flush = flush
        app = Typer()
        app.command()(train_bundled.main)
        app([str(argument) for argument in arguments])

    assert os.waitpid(in_child(command), 0)[1] == signal.SIGKILL
    folder = tmp_path / "classifier"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-00000010"]
    assert (folder / "checkpoint.tmp").exists() and len(losses_written(folder)) < 30
    train(ClassifierTask(data, 8, 0), plan, folder)
    train(ClassifierTask(data, 8, 0), plan, tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")


def losses_written(folder):
    return (folder / "log.jsonl").read_text().splitlines()


def test_a_checkpoint_is_complete_before_it_has_its_name(data, tmp_path, monkeypatch):
    plan = Plan(1e-3, images=4, batch_size=2, checkpoint_steps=1)

    def fail(path):
        raise OSError("no space left")

    monkeypatch.setattr(bundled_checkpoint, "_flush", fail)
    with pytest.raises(OSError):
        train(classifier_task(data, tmp_path), plan, tmp_path / "run")
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def test_all_stages_make_a_bundle_that_loads_and_is_reported(sprites, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MEASURED", 64)
    monkeypatch.setattr(tasks, "GRID", 4)
    app = Typer()
    app.command()(train_bundled.main)
    common = ["--data", str(sprites), "--out", str(tmp_path), "--batch-size", "4", "--seed", "1"]

    def stage(name, *options):
        result = CliRunner().invoke(app, [name, *common, *options])
        assert result.exit_code == 0, result.output

    result = CliRunner().invoke(app, ["unet", *common, "--images", "4"])
    assert result.exit_code == 2 and "vae stage first" in " ".join(result.output.split())
    stage("vae", "--images", "8")
    stage("classifier", "--images", "16", "--statistics", "256")
    stage("unet", "--images", "8", "--latents", "64")
    stage("weak", "--minutes", "0.01", "--latents", "64")
    stage("sd3", "--images", "8", "--latents", "64", "--init", str(tmp_path / "bundle/pipeline"))
    stage("report", "--count", "16", "--steps", "2")
    load_pipeline(tmp_path / "bundle" / "pipeline")
    assert (
        list((tmp_path / "unet").glob("grid-*.png")) and (tmp_path / "contact_sheet.png").exists()
    )
    tokenizer = json.loads((tmp_path / "bundle/pipeline/tokenizer/tokenizer.json").read_text())
    assert tokenizer["padding"] is None and tokenizer["truncation"] is None
    figures = json.loads((tmp_path / "report.json").read_text())
    assert {"concept", "background", "frechet_distance"} <= set(figures["default"])
    assert "weak sibling, scale 1" in (tmp_path / "report.md").read_text()
    stage("report", "--sd3", "--count", "16", "--steps", "2")
    assert "weak sibling" not in (tmp_path / "report.md").read_text()
    configs = (tmp_path / "bundle").rglob("*.json")
    assert not any(str(tmp_path) in path.read_text() for path in configs)


def test_the_judge_is_written_rounded_with_its_report(sprites, tmp_path):
    app = Typer()
    app.command()(train_judge.main)
    options = ["--images", "8", "--batch-size", "4", "--measured", "8"]
    result = CliRunner().invoke(app, ["--data", str(sprites), "--out", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    network = judge.load(tmp_path / "judge")
    assert not network.training and all(p.dtype == torch.float32 for p in network.parameters())
    figures = json.loads((tmp_path / "report.json").read_text())
    assert set(figures) == {"concept", "style", "background", "images"}
