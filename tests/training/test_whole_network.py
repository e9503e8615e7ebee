"""fit.adapter: a LoRA or all weights, for every trainer of the model itself."""

import json

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file
from torch import nn

import sampler
from sampler.models.trainable_network import unfrozen
from sampler.training import checkpoint
from sampler.training.averages import Average
from tests import tiny
from tests import tiny_transformers as tiny2
from tests.training import world

MOVED = {"lr": 1e-3, "weight_decay": 0.0}


def states(pipe):
    """Tensors of all components, by component."""
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    return {name: world.state(part) for name, part in parts.items()}


def saved(folder):
    """Tensors of a component's folder, by name."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("build", [tiny.sd, tiny.sd3])
def test_only_the_right_tensors_move(tmp_path, build, adapter):
    """Checked while the run goes on, in its result, and after it."""
    engine = world.engine(build)
    pipe, name = engine.pipeline.pipe, engine.pipeline.network_name
    before, seen = states(pipe), []

    def reward(images, prompts):
        seen.append(states(pipe))
        return images.mean((1, 2, 3))

    spec = {**world.TRAINERS["nft"], "memory": "on_policy"}
    report = world.tune(engine, tmp_path, spec, reward, updates=3, adapter=adapter, **MOVED)
    during, own = seen[-1], before.pop(name)
    network = during.pop(name)
    assert all(world.same(before[part], during[part]) for part in before)
    after = states(pipe)
    assert all(world.same(before[part], after[part]) for part in before)
    assert world.same(after[name], own)
    if adapter == "lora":
        assert report.lora == tmp_path / "lora"
        bare = {k.replace(".base_layer", ""): v for k, v in network.items() if "finetune" not in k}
        assert world.same(bare, own)
        assert any("lora_B" in key and bool(v.any()) for key, v in network.items())
        return
    assert report.lora == tmp_path / "model"
    trained = dict(engine.pipeline.network.named_parameters())
    moved = [key for key in own if not torch.equal(own[key], network[key])]
    assert set(moved) <= set(trained) and len(moved) > 0.9 * len(trained)
    result = saved(report.lora / name)
    assert any(not torch.equal(result[key], network[key]) for key in moved)  # one update later
    assert all(torch.equal(result[key], own[key]) for key in own if key not in trained)
    for part in before:
        if list((report.lora / part).glob("*.safetensors")):
            kept = saved(report.lora / part)
            assert all(torch.equal(kept[key], before[part][key]) for key in kept)


@pytest.mark.parametrize("trainer", [*world.TRAINERS])
def test_every_trainer_of_the_model_trains_all_weights(tmp_path, trainer):
    """From the weights that were given: the first terms are those of an unchanged network."""
    engine = world.engine(tiny2.lcm if trainer == "rlcm" else tiny.sd)
    before = world.state(engine.pipeline.network)
    options = {"eval_every": 1, "eval_prompts": ["a dog"], "adapter": "full"}
    report = world.tune(engine, tmp_path, trainer, updates=1, **options, **MOVED)
    assert world.same(before, world.state(engine.pipeline.network))
    first, update, last = report.log
    assert first["drift"] == 0 < last["drift"] and update["grad_norm"] > 0
    if trainer == "grpo":
        assert update["ratio_first"] == 0
    if trainer == "nft":
        assert update["gain"] == 0 and update["deviation"] == 0
    made = sampler.load(report.lora, dtype=torch.float32).pipeline.network
    assert not world.same(before, world.state(made))


@pytest.mark.parametrize("trainer", ["nft", "grpo", "dpo"])
def test_a_run_that_breaks_goes_on_bit_equal(tmp_path, trainer):
    """With old and averaged weights; another checkpoint than the last is not needed."""
    engine = world.engine()

    def stop(record):
        if record["update"] == 2:
            raise KeyboardInterrupt

    options = {"adapter": "full", "updates": 3, "ema": 0.5, "checkpoint_every": 1, **MOVED}
    whole = world.tune(engine, tmp_path / "whole", trainer, **options)
    with pytest.raises(KeyboardInterrupt):
        world.tune(engine, tmp_path / "cut", trainer, progress=stop, **options)
    cut = world.tune(engine, tmp_path / "cut", trainer, **options)
    assert world.curve(tmp_path / "whole") == world.curve(tmp_path / "cut")
    for folder in ("model", "model_last"):
        first, second = (saved(report.folder / folder / "unet") for report in (whole, cut))
        assert world.same(first, second)
    average, last = (saved(cut.folder / folder / "unet") for folder in ("model", "model_last"))
    assert not world.same(average, last)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("build", [tiny.sd, tiny.sd3])
def test_half_precision_has_float32_weights_in_training(tmp_path, build, precision):
    """The result and the engine have the data type of the model; steps below it are kept."""
    pipe = build().to(dtype=torch.bfloat16)
    engine = sampler.load(pipe)
    network, name = engine.pipeline.network, engine.pipeline.network_name
    before = world.state(network)
    options = {"adapter": "full", "eval_every": 2, "mixed_precision": precision, "lr": 1e-5}
    report = world.tune(engine, tmp_path, "nft", updates=2, **options)
    assert report.log[0]["drift"] == 0 < report.log[-1]["drift"]
    assert world.same(before, world.state(network)) and network.dtype == torch.bfloat16
    assert not network._forward_pre_hooks
    found = checkpoint.load_newest(tmp_path / "checkpoints").adapter
    assert {value.dtype for value in found.values()} == {torch.float32}
    parts = [key for key in before if f"old.{key}" in found]
    assert len(parts) > 0.9 * len(dict(network.named_parameters()))
    assert any(not torch.equal(found[key], found[key].bfloat16().float()) for key in parts)
    result = saved(report.lora / name)
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    assert all(torch.equal(result[key], found[key].bfloat16()) for key in parts)


@pytest.mark.parametrize("place", ["average", "given"])
def test_autocast_takes_the_weights_that_are_in_place(place):
    """It keeps converted weights by parameter, whose values change within one context."""
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    with unfrozen(layer) as trained, torch.autocast("cpu", torch.bfloat16):
        other = Average.of(trained.parameters)
        own = layer(x)
        with torch.no_grad():
            for parameter in trained.parameters.values():
                parameter.add_(1.0)
        torch.clear_autocast_cache()
        moved = layer(x)
        assert (moved - own).abs().min() > 1
        if place == "average":
            with other.in_place():
                back = layer(x)
        else:
            trained.disable()
            back = layer(x)
            trained.enable()
        assert torch.equal(back, own) and torch.equal(layer(x), moved)


@pytest.mark.parametrize("trainer", ["nft", "awm"])
def test_the_old_weights_are_others_under_autocast(tmp_path, trainer):
    spec = {**world.TRAINERS[trainer], "memory": "slow", "passes": 2}
    options = {"mixed_precision": "bf16", "lr": 1e-2}
    report = world.tune(world.engine(), tmp_path, spec, updates=2, **options)
    assert all(record["deviation"] > 0 for record in report.log)


@pytest.mark.parametrize(
    ("trainer", "settings", "problem"),
    [
        ("nft", {"rank": 4}, "fit.rank is of a LoRA; adapter = 'full' trains the network itself"),
        ("nft", {"init_lora": "x"}, "fit.init_lora is of a LoRA"),
        ("f_distill", {}, "fit.adapter is of trainers that change the model; set student and"),
        ("prox_matching", {}, "fit.adapter is of trainers that change the model; leave it out"),
        ("nft", {"adapter": "dora"}, "adapter = 'dora' must be"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(tmp_path, trainer, settings, problem):
    with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
        world.tune(world.engine(), tmp_path, trainer, **{"adapter": "full", **settings})
    assert "\n" not in str(error.value) and not (tmp_path / "config.json").exists()


def test_quantised_weights_are_refused():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="has uint8 ones; train a LoRA"), unfrozen(layer):
        pass


def test_what_offloading_moves_is_refused(tmp_path):
    engine = world.engine()
    add_hook_to_module(engine.pipeline.network, ModelHook())
    with pytest.raises(ValueError, match="fit.adapter = 'full': the model is loaded with offload"):
        world.tune(engine, tmp_path, "nft", adapter="full")


def test_a_pipeline_is_written_in_silence(tmp_path, capfd):
    world.tune(world.engine(), tmp_path, "nft", updates=1, adapter="full")
    assert capfd.readouterr() == ("", "")


def test_the_defaults_are_those_of_whole_networks(tmp_path):
    engine = world.engine()
    settings = {**world.SHORT, "lr": None}
    for adapter, lr in ((None, 3e-4), ("full", 1e-5)):
        sampler.finetune(
            engine, world.TRAINERS["nft"], "brightness", world.PROMPTS, tmp_path / str(adapter),
            1, settings={**settings, "adapter": adapter},
        )  # fmt: skip
        fit = json.loads((tmp_path / str(adapter) / "config.json").read_text())["fit"]
        assert fit["lr"] == lr and fit["adapter"] == (adapter or "lora")
        assert (fit["rank"] is None) == (adapter == "full")
