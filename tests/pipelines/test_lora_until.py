"""LoRAs that are used in the first steps of a run alone."""

import threading

import pytest
import torch

import sampler
from sampler.models.lora import load_lora, unload_lora
from sampler.models.trainable_lora import adapted, save_lora
from sampler.pipelines.loras import lora_layers
from sampler.workers.in_memory import model_in_memory
from tests import tiny

SIZE = {"height": 16, "width": 16, "output": "latent", "seeds": [3, 4]}
PROMPTS = ["a dog", "a cat"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of the tiny UNet that changes every image."""
    folder = tmp_path_factory.mktemp("lora")
    network = tiny.sd().unet
    with adapted(network, 2, 2, ["to_q", "to_v", "to_k", "to_out.0"], 0) as adapter:
        for number, parameter in enumerate(adapter.parameters.values()):
            torch.manual_seed(number)
            parameter.data = torch.randn_like(parameter)
        save_lora(adapter, "unet", folder, {})
    return folder


def made(engine, steps=4, **options):
    return engine.generate(PROMPTS, steps=steps, **SIZE, **options).latents


def by_hand(steps, switch, lora, **options):
    """A run whose first `switch` steps have the LoRA, and the others are of the base model."""
    engine = sampler.load(tiny.sd())
    load_lora(engine, lora)
    adapter = engine.pipeline
    size = (16, 16)
    with torch.no_grad():
        cond = adapter.encode(PROMPTS, ["", ""], True, size)
        draw = [torch.Generator().manual_seed(seed) for seed in SIZE["seeds"]]
        shape = (1, *adapter.latent_shape(*size))
        x = torch.cat([torch.randn(shape, generator=g) for g in draw])
        method = sampler.build("sampler", options.get("sampler", "ddim"))
        start, grid = engine.start(x, adapter.grid(steps, size), cond, method, seeds=SIZE["seeds"])
        for snapshot in engine.steps(start, grid, cond, method):
            if snapshot.index == switch:
                unload_lora(engine)
                break
        for snapshot in engine.steps(snapshot, grid, cond, method):
            pass
    return snapshot.x


@pytest.mark.parametrize(("steps", "until", "switch"), [(5, 0.4, 2), (10, 0.7, 7), (3, 0.5, 2)])
def test_the_first_steps_have_it_and_the_others_are_the_base_models(lora, steps, until, switch):
    engine = sampler.load(tiny.sd())
    base = made(engine, steps)
    load_lora(engine, (lora, 1.0), until=until)
    found = made(engine, steps)
    assert torch.equal(found, by_hand(steps, switch, lora))
    assert not torch.equal(found, base)
    unload_lora(engine)
    load_lora(engine, lora)
    assert not torch.equal(made(engine, steps), found)
    unload_lora(engine)
    assert torch.equal(made(engine, steps), base)


def test_a_sampler_of_two_evaluations_counts_its_own_steps(lora):
    engine = sampler.load(tiny.sd())
    load_lora(engine, lora, until=0.5)
    assert torch.equal(made(engine, 2, sampler="heun"), by_hand(2, 2, lora, sampler="heun"))


def test_all_of_the_steps_is_a_lora_without_a_limit(lora):
    engine = sampler.load(tiny.sd())
    load_lora(engine, lora)
    whole = made(engine)
    unload_lora(engine)
    load_lora(engine, lora, until=1.0)
    assert torch.equal(made(engine), whole)


def test_nothing_is_left_switched_off_or_trainable(lora):
    engine = sampler.load(tiny.sd())
    load_lora(engine, lora, until=0.1)
    made(engine)
    network = engine.pipeline.network
    assert not any(layer.disable_adapters for layer in lora_layers(network))
    assert not any(p.requires_grad for n, p in network.named_parameters() if "lora_" in n)


def test_threads_do_not_switch_it_under_each_other(lora):
    engine = sampler.load(tiny.sd())
    load_lora(engine, lora, until=0.5)
    wanted, found = made(engine), []
    threads = [threading.Thread(target=lambda: found.append(made(engine))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(one, wanted) for one in found)


def test_it_decides_the_key_of_an_image(lora):
    found = set()
    for until in (None, 0.4, 0.6):
        engine = sampler.load(tiny.sd())
        load_lora(engine, lora, until=until)
        found.add(model_in_memory(engine).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("until", "problem"), [(0, "above 0"), (1.2, "at most 1"), (float("nan"), "above 0")]
)
def test_a_share_outside_the_run_is_refused(lora, until, problem):
    engine = sampler.load(tiny.sd())
    with pytest.raises(ValueError, match=problem):
        load_lora(engine, lora, until=until)
    assert not lora_layers(engine.pipeline.network)


def test_what_it_cannot_reach_is_refused(lora, tmp_path):
    with pytest.raises(sampler.SamplerError, match="needs a LoRA"):
        sampler.load(lora_until=0.5)
    with pytest.raises(ValueError, match="lora_until has no effect on a pipeline"):
        sampler.load(tiny.sd(), lora_until=0.5)
    engine = sampler.load(tiny.sd())
    load_lora(engine, lora, until=0.5)
    with pytest.raises(sampler.SamplerError, match="uses LoRAs in all steps"):
        engine.as_hosted()
