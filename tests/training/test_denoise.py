"""Supervised fine-tuning: its loss, its data, captions, resuming, results, refusals."""

import csv
import json
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import sampler
from sampler.cli import main
from sampler.core.image_files import open_image
from sampler.core.noise import Noise
from sampler.objectives import min_snr_weight
from sampler.training import checkpoint
from sampler.training.batches import batch
from sampler.training.data import captions, covering
from sampler.training.denoise.trainer import Denoise
from sampler.training.listing import listed
from sampler.types import Level
from tests import tiny
from tests import tiny_transformers as tiny2
from tests.training import world
from tests.training.test_fit import flat_moment

CAPTIONS = ["a dog", "a cat", "a dog", "a red car"]


@pytest.fixture(scope="module")
def engine():
    return world.engine()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images of 16 x 16 pixels with captions beside them, one of them twice."""
    out = tmp_path_factory.mktemp("pictures")
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (16, 16), (60 * number, 250 - 50 * number, 90)).save(out / f"{number}.png")
        (out / f"{number}.txt").write_text(f"{caption}\n")
    return out


def tune(over, out, data, updates=2, progress=None, trainer=None, **settings):
    return sampler.finetune(
        over,
        {"name": "denoise", "data": str(data), **(trainer or {})},
        None,
        out=out,
        updates=updates,
        settings={**world.SHORT, "guidance": "none", **settings},
        progress=progress,
    )


def fine(over, out, data, adapter="lora", **options):
    return tune(over, out, data, trainer={"dropout": 0.3}, adapter=adapter, **options)


def x0_model():
    return tiny.sd(scheduler=DDIMScheduler(**tiny.DDIM, prediction_type="sample"))


PIPELINES = {
    "eps": tiny.sd, "v": lambda: tiny.sd("v"), "x0": x0_model, "velocity": tiny.sd3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "weight"), [("eps", "none"), *((kind, "min_snr") for kind in PIPELINES)]
)
def test_the_loss_is_that_of_stock_training_scripts(kind, weight, folder, tmp_path):
    """Written out: the stock VAE and network, noise and time of the samples, the script's weights.

    The LoRA is zero at the first step, so that the network is the given one.
    """
    over = world.engine(PIPELINES[kind])
    pipeline, pipe = over.pipeline, over.pipeline.pipe
    trainer = {"weight": weight, "dropout": 0.0}
    report = tune(over, tmp_path, folder, 1, trainer=trainer, batch=4, seed=3)
    rows = batch(CAPTIONS, 4, 0, 3)
    images = torch.cat([_pixels(folder / f"{n}.png") for n in rows.numbers])
    with torch.no_grad():
        encoded = pipe.vae.encode(images * 2 - 1)
        x0 = encoded.latent_dist.mode()
        x0 = (x0 - (pipe.vae.config.get("shift_factor") or 0)) * pipe.vae.config.scaling_factor
        times = report.log[0]["time"]
        shares = [_share(3, row) for row in range(4)]
        assert times == pytest.approx(sum(shares) / 4, rel=1e-6)
        eps = Noise(rows.seeds).draw(0, x0, "renoise")
        cond = pipeline.encode(list(rows.prompts), [""] * 4, False, (16, 16)).cond
        losses = []
        for i, share in enumerate(shares):
            if kind == "velocity":
                alpha, sigma, t = 1 - share, share, 1000 * share
            else:
                t = int(1000 * share)
                acp = pipe.scheduler.alphas_cumprod[t]
                alpha, sigma = acp**0.5, (1 - acp) ** 0.5
            target = {
                "eps": eps[i], "x0": x0[i], "velocity": eps[i] - x0[i],
                "v": alpha * eps[i] - sigma * x0[i],
            }[kind]  # fmt: skip
            own = {k: v[i : i + 1] for k, v in cond.items() if isinstance(v, torch.Tensor)}
            noised = (alpha * x0[i] + sigma * eps[i])[None]
            out = pipeline.network(noised, timestep=torch.tensor([t]), return_dict=False, **own)[0]
            snr = (alpha / sigma) ** 2
            factor = {"eps": min(snr, 5) / snr, "v": min(snr, 5) / (snr + 1), "x0": min(snr, 5),
                      "velocity": min(snr, 5) * sigma**2}[kind]  # fmt: skip
            error = (out[0] - target).square().mean()
            losses.append(error * (factor if weight == "min_snr" else 1))
    assert report.log[0]["loss"] == pytest.approx(float(sum(losses)) / 4, rel=1e-4)


def _share(seed, row):
    import random

    from sampler.training.batches import derived

    return random.Random(derived(seed, 0, f"time {row}")).random()


def _pixels(path):
    with open_image(path) as image:
        return torch.tensor(list(image.convert("RGB").getdata())).view(1, 16, 16, 3).permute(
            0, 3, 1, 2
        ) / 255  # fmt: skip


def test_weights_at_the_ends_of_the_levels():
    """Without signal the weight of eps is 1; without noise that of x0 is gamma."""
    alpha, sigma = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.0, 0.6, 1.0], [1.0, 0.8, 0.0])
    )
    level = Level(torch.tensor([999, 500, 0]), alpha, sigma)
    assert min_snr_weight("eps", level, 5).tolist() == pytest.approx([1, 1, 0], abs=1e-12)
    assert min_snr_weight("x0", level, 5).tolist() == pytest.approx([0, 0.5625, 5])
    assert min_snr_weight("v", level, 5).tolist() == pytest.approx([0, 0.36, 0], abs=1e-12)
    with pytest.raises(ValueError, match="one of eps, x0, v, velocity"):
        min_snr_weight("noise", level)


def test_every_image_is_seen_once_in_a_pass_whatever_its_caption(engine, folder, tmp_path):
    rows = [batch(CAPTIONS, 2, update, 0) for update in range(4)]
    seen = [number for part in rows for number in part.numbers]
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3] and seen[:4] != seen[4:]
    assert [p for part in rows for p in part.prompts] == [CAPTIONS[n] for n in seen]
    tune(engine, tmp_path, folder, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["prompts"] == CAPTIONS and config["trainer"]["times"] == {"name": "uniform"}


def test_a_dropped_caption_is_the_branch_without_condition(engine, folder, tmp_path):
    """All dropped: the loss of a data set of empty captions, and not that of the captions."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for number in range(4):
        (empty / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    losses = {}
    for name, data, trainer in (
        ("kept", folder, {"dropout": 0.0}),
        ("dropped", folder, {"dropout": 1.0}),
        ("empty", empty, {"dropout": 0.0, "caption": ""}),
    ):
        out = tmp_path / name
        losses[name] = tune(engine, out, data, 1, trainer=trainer, batch=4).log[0]["loss"]
    assert losses["dropped"] == pytest.approx(losses["empty"], rel=1e-6)
    assert abs(losses["kept"] - losses["dropped"]) > 1e-4 * losses["kept"]


def result(report):
    """The tensors of a run's result, as bytes."""
    folder = report.lora / "unet" if report.lora.name == "model" else report.lora
    (file,) = folder.glob("*.safetensors")
    return {k: v.numpy().tobytes() for k, v in load_file(file).items()}


@pytest.mark.parametrize(("adapter", "ema"), [("lora", 0.0), ("full", 0.5)])
def test_a_run_that_breaks_goes_on_bit_equal(engine, folder, tmp_path, adapter, ema):
    before = world.state(engine.pipeline.network)

    def stop(record):
        if record["update"] == 3:
            raise KeyboardInterrupt

    times = {"times": "logit_normal"}
    options = {"trainer": times, "adapter": adapter, "ema": ema, "updates": 4}
    whole = tune(engine, tmp_path / "whole", folder, **options)
    with pytest.raises(KeyboardInterrupt):
        tune(engine, tmp_path / "cut", folder, progress=stop, **options)
    assert world.same(before, world.state(engine.pipeline.network))
    assert [p.name for p in checkpoint.complete(tmp_path / "cut" / "checkpoints")] == ["000002"]
    cut = tune(engine, tmp_path / "cut", folder, **options)
    assert world.curve(tmp_path / "cut") == world.curve(tmp_path / "whole")
    assert result(cut) == result(whole)


def test_micro_batches_do_not_change_the_gradient(engine, folder, tmp_path):
    grads = []
    for micro in (5, 2, 1):
        out = tmp_path / str(micro)
        fine(engine, out, folder, updates=1, batch=5, micro=micro, clip=0)
        grads.append(flat_moment(out))
    for other in grads[1:]:
        assert (other - grads[0]).norm() <= 1e-4 * grads[0].norm() > 0


def test_a_whole_network_becomes_a_stock_pipeline(engine, folder, tmp_path):
    """The average is evaluated and saved, and the engine is left as it was."""
    network = engine.pipeline.network
    before, modes = world.state(network), {n: m.training for n, m in network.named_modules()}
    flags = {n: (p.requires_grad, p.grad is None) for n, p in network.named_parameters()}
    options = {"eval_every": 2, "eval_prompts": ["a dog"], "ema": 0.5, "lr": 1e-3}
    report = fine(engine, tmp_path, folder, "full", updates=2, **options)
    assert world.same(before, world.state(network))
    assert modes == {n: m.training for n, m in network.named_modules()}
    assert flags == {n: (p.requires_grad, p.grad is None) for n, p in network.named_parameters()}
    assert report.lora == tmp_path / "model" and (tmp_path / "model_last").is_dir()
    manifest = json.loads((report.lora / "manifest.json").read_text())
    assert manifest["kind"] == "model" and manifest["fit"]["adapter"] == "full"
    assert manifest["updates"] == 2 and manifest["fit"]["ema"] == 0.5
    first, last = (r for r in report.log if r["kind"] == "eval")
    assert first["drift"] == 0 < last["drift"]
    made = sampler.load(StableDiffusionPipeline.from_pretrained(report.lora, dtype=torch.float32))
    drawn = {"steps": 2, "seeds": [0], "height": 16, "width": 16, "output": "latent",
             "sampler": {"name": "ab", "order": 2}, "guidance": "none"}  # fmt: skip
    ours, base = (over.generate(["a dog"], **drawn).latents for over in (made, engine))
    assert float((ours - base).square().mean()) == pytest.approx(last["drift"], rel=1e-4)


def test_it_learns_a_picture_by_heart(tmp_path):
    """40 updates on one image: its samples are then closer to it than before."""
    over = world.engine(tiny.sd, tiny_vae=True)
    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / "red.png")
    trainer = {"caption": "a red square", "dropout": 0.0}
    options = {
        "adapter": "full",
        "batch": 4,
        "lr": 3e-3,
        "checkpoint_every": 40,
        "trainer": trainer,
    }
    report = tune(over, tmp_path / "run", tmp_path, 40, **options)
    errors = [r["error"] for r in report.log]
    assert sum(errors[-8:]) < 0.7 * sum(errors[:8])
    target = load_file(tmp_path / "run" / "data.safetensors")["latents"]
    drawn = {"seeds": [1, 2, 3, 4], "steps": 10, "height": 16, "width": 16, "guidance": "none",
             "output": "latent"}  # fmt: skip
    far = over.generate(["a red square"] * 4, **drawn).latents
    near = sampler.load(report.lora, dtype=torch.float32).generate(["a red square"] * 4, **drawn)
    assert (near.latents - target).norm() < 0.8 * (far - target).norm()


@pytest.mark.parametrize("build", [tiny.sdxl, tiny.dit, tiny2.ddpm], ids=lambda b: b.__name__)
def test_pipelines(folder, tmp_path, build):
    """DiT learns without its class half of the time; the pixel model clips x0 when it samples."""
    over = world.engine(build)
    size = over.pipeline.size(None, None)
    trainer, prompts = {"dropout": 0.5}, ["a dog"]
    if build in (tiny.dit, tiny2.ddpm):
        data = tmp_path / "pictures"
        data.mkdir()
        for name in ("0.png", "1.png"):
            (data / name).write_bytes((folder / name).read_bytes())
        prompts = ["3" if build is tiny.dit else ""]
        trainer |= {"caption": prompts[0], "dropout": 0.5 * (build is tiny.dit)}
        folder = data
    options = {"batch": 4, "height": size[0], "width": size[1], "eval_prompts": prompts}
    report = tune(over, tmp_path / "run", folder, 1, trainer=trainer, **options)
    assert report.log[0]["grad_norm"] > 0 and report.log[0]["nfe"] == 4


def test_the_error_is_that_of_the_network_not_of_the_clipped_image(tmp_path):
    """DDPM clips x0 where it samples; a clipped estimate would have no gradient."""
    over = world.engine(tiny2.ddpm)
    assert over.pipeline.pipe.scheduler.config.clip_sample
    x = 5 * torch.randn(1, *over.pipeline.latent_shape(*over.pipeline.size(None, None)))
    level = over.pipeline.schedule.level(900)
    from sampler.training.session import Session

    session = Session(over, None, over.sampler, over.guidance, 2, (16, 16), 1)
    from sampler.types import Branch, Span

    for network, kind in ((session.network(), "eps"), (over.pipeline, "x0")):
        pred = network(x, Span(0, level, level), {"cond": Branch({})}, [0])["cond"]
        assert pred.kind == kind


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="," if "csv" in path.name else "\t"
            )
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_tables_of_images_and_captions(folder, tmp_path, suffix):
    """By their usual column names; others are told; paths are relative to the table."""
    rows = [{"file_name": f"{folder}/{n}.png", "text": c} for n, c in enumerate(CAPTIONS)]
    write_table(tmp_path / f"metadata{suffix}", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captions(str(tmp_path)) == captions(str(tmp_path / f"metadata{suffix}")) == CAPTIONS
    other = [{"image": f"{n}.png", "caption": c, "score": 1} for n, c in enumerate(CAPTIONS)]
    write_table(tmp_path / f"other{suffix}", other)
    with pytest.warns(UserWarning, match="not used: columns score"):
        found = listed(str(tmp_path / f"other{suffix}"))
    assert found[3] == (tmp_path / "3.png", "a red car")


def test_a_file_of_latents_is_data(engine, folder, tmp_path):
    by_folder = tune(engine, tmp_path / "a", folder, 2)
    by_file = tune(engine, tmp_path / "b", tmp_path / "a" / "data.safetensors", 2)
    assert result(by_folder) == result(by_file) and not (tmp_path / "b/data.safetensors").exists()
    first = tune(engine, tmp_path / "c", folder, 1, trainer={"count": 2})
    assert len(load_file(tmp_path / "c" / "data.safetensors")["latents"]) == 2
    assert first.log[0]["images"] == 2


def test_images_of_another_size_cover_the_trained_one_or_are_refused(engine, tmp_path):
    """A 40 x 24 image: its middle 24 x 24, scaled; red stripes at the ends are cut off."""
    image = torch.zeros(1, 3, 24, 40)
    image[..., :8], image[..., -8:] = 1.0, 1.0
    found = covering(image, 12, 12)
    assert found.shape == (1, 3, 12, 12) and found[..., 2:-2].max() < 0.05
    assert covering(torch.rand(1, 3, 15, 31), 16, 16).shape[-2:] == (16, 16)
    Image.new("RGB", (40, 24), (9, 200, 30)).save(tmp_path / "wide.png")
    trainer = {"caption": "a field"}
    assert tune(engine, tmp_path / "run", tmp_path, 1, trainer=trainer).log[0]["loss"] > 0
    with pytest.raises(sampler.SamplerError, match="wide.png is 40 x 24 pixels; this run needs"):
        tune(engine, tmp_path / "b", tmp_path, 1, trainer={**trainer, "crop": False})


@pytest.mark.parametrize(
    ("trainer", "settings", "problem"),
    [
        ({"data": "nowhere"}, {}, "data = nowhere is neither a folder of images, a table"),
        ({"data": "bare"}, {}, "bare/0.png: the image has no caption; write 0.txt beside it"),
        ({"data": "empty"}, {}, "data = empty has no images"),
        ({"data": "rows.jsonl"}, {}, "rows.jsonl must have .* per row: rows.jsonl:1 has none"),
        ({"data": "broken.jsonl"}, {}, "broken.jsonl:1: not a JSON line"),
        ({"data": "gone.jsonl"}, {}, "x.png: no such file"),
        ({"data": "few.safetensors"}, {}, "holds .2, 4, 3, 3. latents and 2 captions; a latent of"),
        ({}, {"rank": 4, "adapter": "full"}, "fit.rank is of a LoRA; adapter = 'full' trains"),
        ({"times": "early"}, {}, "denoise: times: unknown law 'early'"),
        ({"dropout": 1.5}, {}, "dropout = 1.5 must be a number from 0 to 1"),
        ({"weight": "snr"}, {}, "weight = 'snr' must be"),
        ({}, {"patience": 2, "eval_every": 1}, "need a reward"),
        ({}, {"init_lora": "missing"}, "missing does not exist"),
    ],
)
def test_bad_input_is_one_sentence(
    engine, folder, tmp_path, monkeypatch, trainer, settings, problem
):
    monkeypatch.chdir(tmp_path)
    for name in ("bare", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "bare" / "0.png").write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "rows.jsonl").write_text('{"text": "a dog"}')
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "gone.jsonl").write_text('{"image": "x.png", "text": "a dog"}')
    latents, listing = torch.zeros(2, 4, 3, 3), {"prompts": json.dumps(CAPTIONS[:2])}
    save_file({"latents": latents}, "few.safetensors", listing)
    with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
        tune(engine, tmp_path / "run", trainer.pop("data", folder), 1, trainer=trainer, **settings)
    assert "\n" not in str(error.value)
    assert not getattr(engine.pipeline.network, "peft_config", None)


def test_other_refusals(engine, folder, tmp_path):
    spec = {"name": "denoise", "data": str(folder)}
    with pytest.raises(
        sampler.SamplerError, match="the prompts are the captions of its data; leave them"
    ):
        sampler.finetune(engine, spec, None, ["a dog"], tmp_path)
    with pytest.raises(ValueError, match="needs the field 'data'"):
        sampler.build("trainer", "denoise")
    with pytest.raises(ValueError, match="blur few-step models"):
        tune(world.engine(tiny2.lcm), tmp_path, folder, 1)
    movis = {"trainer": {"times": "movis"}}
    tune(engine, tmp_path / "run", folder, 1, **movis)
    with pytest.raises(sampler.SamplerError, match="differs in fit.updates"):
        tune(engine, tmp_path / "run", folder, 2, **movis)
    assert Denoise("d", times="movis").scheduled and not Denoise("d").scheduled


def test_the_command(folder, tmp_path, capsys):
    """A dry run encodes and trains a part, and keeps nothing; then the run itself."""
    call = ["finetune", "--trainer", "denoise", "--data", str(folder), "--set", "fit.batch=2"]
    call += ["-o", str(tmp_path / "run"), "--updates", "1"]
    assert main([*call, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "4 prompts" in told and "Dry run: an update of 2 images" in told
    assert not (tmp_path / "run").exists()
    assert main([*call, "-q"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "lora")
    assert main([*call, "-q", "--data", "nowhere"]) == 2
    assert "data = nowhere is neither" in capsys.readouterr().err
