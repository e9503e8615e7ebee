"""Adapters: back in a stock pipeline, back in an engine, weighted, mixed, refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sampler
from sampler.models.lora import load_lora, unload_lora
from sampler.models.lora_files import FILE, lora_file, mix_lora, parse_lora, read_lora
from sampler.models.trainable_lora import adapted, default_targets, save_lora, shared
from tests import tiny
from tests import tiny_transformers as tiny2
from tests.training import world


def tuned(build, out, seed=0, rank=4, alpha=8):
    """A pipeline's engine, and the file of an adapter whose B is not zero."""
    made = build()
    engine = made if isinstance(made, sampler.Engine) else sampler.load(made)
    pipeline = engine.pipeline
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    with adapted(pipeline.network, rank, alpha, targets, seed) as adapter:
        torch.manual_seed(seed + 1)
        for parameter in adapter.parameters.values():
            parameter.data = 0.3 * torch.randn_like(parameter)
        made = images(engine)
        save_lora(adapter, pipeline.network_name, out, {})
    return engine, made


def images(engine):
    rule = {"name": "cfg", "scale": 4.0}
    options = {"steps": 3, "guidance": rule, "sampler": "ddim", "output": "tensor"}
    return engine.generate(["a dog"], seeds=5, **options).images


@pytest.mark.parametrize("build", [tiny.sd, tiny.sdxl, tiny.sd3, tiny.flux])
def test_stock_pipelines_make_our_images(tmp_path, build):
    """With the adapter by `load_lora_weights` and the same first noise."""
    _, ours = tuned(build, tmp_path)
    stock = build()
    generator = torch.Generator("cpu").manual_seed(5)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    if build is tiny.flux:
        options["true_cfg_scale"], options["negative_prompt"] = options.pop("guidance_scale"), ""

    def run():
        return torch.tensor(stock("a dog", generator=generator.manual_seed(5), **options).images)

    bare = run()
    stock.load_lora_weights(str(tmp_path))
    theirs = run().permute(0, 3, 1, 2)
    assert (theirs - ours).abs().max() <= 2e-6  # stock Flux evaluates the branches one by one
    assert (bare.permute(0, 3, 1, 2) - ours).abs().max() > 0.01


def test_pixart_adapters_load_with_peft(tmp_path):
    """PixArt's stock pipelines have no loader for adapters; peft's own reads the file."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    engine, ours = tuned(tiny.pixart, tmp_path)
    state = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / FILE).items()}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    wrapped = get_peft_model(engine.pipeline.network, config)
    state = {f"base_model.model.{k}": v for k, v in state.items()}
    assert not set_peft_model_state_dict(wrapped, state).unexpected_keys
    assert torch.equal(images(engine), ours)


@pytest.mark.parametrize("alpha", [1, 2.5, 8])
def test_the_strength_is_in_the_tensors(tmp_path, alpha):
    """lora_alpha = rank in the header: tools that ignore it apply the same ΔW."""
    engine, ours = tuned(tiny.sd, tmp_path, rank=4, alpha=alpha)
    tensors, header = read_lora(tmp_path / FILE)
    assert header["unet.r"] == header["unet.lora_alpha"] == 4
    stock = tiny.sd()
    headless = tmp_path / "headless.safetensors"
    save_file(tensors, headless)
    stock.load_lora_weights(str(headless))
    found = images(sampler.load(stock))
    assert (found - ours).abs().max() <= 1e-5
    load_lora(engine, tmp_path)
    assert (images(engine) - ours).abs().max() <= 1e-5


def test_a_run_starts_from_a_lora(tmp_path):
    """Of another rank and strength; what the run leaves out or cannot hold is refused by name."""
    engine, _ = tuned(tiny.sd, tmp_path / "first", rank=2, alpha=3)
    load_lora(engine, (tmp_path / "first", 0.5))
    wanted = images(engine)
    unload_lora(engine)
    modules = len(list(engine.pipeline.network.modules()))
    start = f"{tmp_path / 'first'}:0.5"
    seen = []

    def reward(pictures, prompts):
        seen.append(images(engine))
        return pictures.mean((1, 2, 3))

    run = tmp_path / "run"
    world.tune(engine, run, "ddpo", reward, updates=1, rank=4, alpha=1, init_lora=start)
    assert (seen[0] - wanted).abs().max() <= 1e-5
    assert "init_lora" in json.loads((run / "config.json").read_text())
    for settings, problem in (
        ({"rank": 1}, "fit.rank = 1 is less than 2, the rank of fit.init_lora"),
        ({"targets": ["to_q"]}, "which fit.targets leaves out; add 'to_k' to fit.targets"),
    ):
        with pytest.raises(sampler.SamplerError, match=problem):
            world.tune(engine, tmp_path / problem, updates=1, init_lora=start, **settings)
        assert len(list(engine.pipeline.network.modules())) == modules
    tuned(tiny.sd, tmp_path / "first", seed=3)
    with pytest.raises(sampler.SamplerError, match="differs in init_lora"):
        world.tune(engine, run, "ddpo", reward, updates=1, rank=4, alpha=1, init_lora=start)


def test_default_targets_reach_fused_layers(tmp_path):
    """Flux 2's single-stream blocks have one projection in and one out."""
    engine = world.engine(tiny2.flux2)
    network = engine.pipeline.network
    targets = default_targets(network)
    with adapted(network, 2, 2, targets, 0) as adapter:
        trained = {name.partition(".lora_")[0] for name in adapter.parameters}
        save_lora(adapter, "transformer", tmp_path, {})
    singles = len(network.single_transformer_blocks)
    for leaf in ("to_qkv_mlp_proj", "to_out"):
        assert sum(name.endswith(f".{leaf}") for name in trained) == singles
    assert default_targets(tiny.sd().unet) == ("to_q", "to_k", "to_v", "to_out.0")
    load_lora(engine, tmp_path)


@pytest.mark.parametrize("build", [tiny.sd, tiny.pixart])
def test_engines_load_and_unload(tmp_path, build):
    engine, ours = tuned(build, tmp_path / "lora")
    bare = images(engine)
    load_lora(engine, tmp_path)  # as a run folder: the adapter is in lora/
    assert torch.equal(images(engine), ours)
    assert not any(p.requires_grad for p in engine.pipeline.network.parameters())
    with pytest.raises(sampler.SamplerError, match="has LoRAs already"):
        load_lora(engine, tmp_path)
    with pytest.raises(sampler.SamplerError, match="has LoRAs already"):
        world.tune(engine, tmp_path / "other")
    unload_lora(engine)
    assert torch.equal(images(engine), bare)
    load_lora(engine, (tmp_path / "lora", 0.0))
    assert torch.equal(images(engine), bare)


def output(engine):
    """The network's own answer to fixed inputs."""
    pipeline = engine.pipeline
    cond = pipeline.encode(["a dog"], [""], False, (32, 32)).cond
    torch.manual_seed(0)
    level = pipeline.grid(3, (32, 32))[0]
    with torch.no_grad():
        return pipeline.forward(torch.randn(1, 4, 16, 16), level, cond, "main")


def test_mixing_is_linear_in_the_change_of_the_weights(tmp_path):
    """w·ΔW₁ + (1 − w)·ΔW₂, for adapters of different rank and scale."""
    engine, _ = tuned(tiny.sd, tmp_path / "a", seed=0, rank=2, alpha=4)
    tuned(tiny.sd, tmp_path / "b", seed=9, rank=3, alpha=3)
    plain = dict(engine.pipeline.network.state_dict())
    deltas = []
    for name in "ab":
        load_lora(engine, tmp_path / name)
        deltas.append(_deltas(engine.pipeline.network))
        unload_lora(engine)
    mix_lora(tmp_path / "a", tmp_path / "b", 0.3, tmp_path / "m")
    load_lora(engine, tmp_path / "m")
    for key, found in _deltas(engine.pipeline.network).items():
        wanted = 0.3 * deltas[0][key] + 0.7 * deltas[1][key]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    mixed = output(engine)
    unload_lora(engine)
    load_lora(engine, (tmp_path / "a", 0.3), (tmp_path / "b", 0.7))
    torch.testing.assert_close(output(engine), mixed, rtol=1e-4, atol=1e-5)
    unload_lora(engine)
    assert world.same(plain, engine.pipeline.network.state_dict())


def _deltas(network):
    return {
        name: module.get_delta_weight(module.active_adapters[0])
        for name, module in network.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_files_that_do_not_fit_are_refused(tmp_path):
    engine, _ = tuned(tiny.sd, tmp_path / "sd")
    modules = len(list(engine.pipeline.network.modules()))
    with pytest.raises(sampler.SamplerError, match="does not exist") as error:
        load_lora(engine, tmp_path / "nothing")
    assert error.value.code == 6
    other = world.engine(tiny.pixart)
    with pytest.raises(sampler.SamplerError, match="not a LoRA of a transformer"):
        load_lora(other, tmp_path / "sd")
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(sampler.SamplerError, match="not an intact safetensors"):
        load_lora(engine, tmp_path / FILE)
    tuned(tiny.sdxl, tmp_path / "xl")
    with pytest.raises(sampler.SamplerError, match="does not fit StableDiffusionPipeline"):
        load_lora(engine, tmp_path / "xl")
    save_file({"unet.x": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(sampler.SamplerError, match="its tensor unet.x is not of a LoRA"):
        load_lora(engine, tmp_path / FILE)
    assert len(list(engine.pipeline.network.modules())) == modules


def test_the_command_lines_form(tmp_path):
    assert parse_lora("runs/a") == ("runs/a", 1.0)
    assert parse_lora("runs/a:0.5") == ("runs/a", 0.5)
    (tmp_path / "a:1").mkdir()
    assert parse_lora(str(tmp_path / "a:1")) == (str(tmp_path / "a:1"), 1.0)
    with pytest.raises(ValueError, match="PATH or PATH:weight"):
        parse_lora("runs/a:b")
    assert np.isclose(parse_lora("a:1e-1")[1], 0.1)
    with pytest.raises(sampler.SamplerError):
        lora_file(tmp_path)


def test_two_loras_share_one_network(tmp_path):
    """Each acts, and has the gradient, of a LoRA alone; between calls the network is as given."""
    pipe, options = tiny.sd(), (4, 8, ["to_q", "to_v"], 0)
    network, x = pipe.unet, torch.randn(1, 4, 8, 8)
    call = {"timestep": 500, "encoder_hidden_states": torch.randn(1, 16, 32)}
    given, flags = network(x, **call).sample, [p.requires_grad for p in network.parameters()]

    def filled(lora, seed):
        torch.manual_seed(seed)
        for parameter in lora.parameters.values():
            parameter.data = 0.3 * torch.randn_like(parameter)
        return list(lora.parameters.values())

    def gradients(view, parameters):
        out = view(x, **call).sample
        return out, lambda: torch.autograd.grad(out.square().sum(), parameters)

    with shared(network, ["student", "fake"], *options) as loras:
        weights = {n: filled(lora, k) for k, (n, lora) in enumerate(loras.items())}
        made = {n: gradients(lora.network, weights[n]) for n, lora in loras.items()}
        assert torch.equal(network(x, **call).sample, given)  # before the backward passes
        found = {n: (out.detach(), backward()) for n, (out, backward) in made.items()}
        assert torch.equal(network(x, **call).sample, given)
        assert all(p.requires_grad for ps in weights.values() for p in ps)
        save_lora(loras["fake"], "unet", tmp_path, {})
    assert flags == [p.requires_grad for p in network.parameters()]
    assert torch.equal(network(x, **call).sample, given) and not torch.equal(
        found["fake"][0], given
    )
    for k, name in enumerate(("student", "fake")):
        with adapted(network, *options) as lora:
            out, backward = gradients(network, filled(lora, k))
            assert torch.equal(out, found[name][0])
            assert all(map(torch.equal, backward(), found[name][1]))
    pipe.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(network(x, **call).sample, found["fake"][0], rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    network.enable_gradient_checkpointing()
    with (
        pytest.raises(ValueError, match="gradient checkpointing"),
        shared(network, ["a"], *options),
    ):
        pass
