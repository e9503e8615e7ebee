"""`sampler.guide` around offloading, shared networks, threads, and pipelines that change inside."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from accelerate import cpu_offload
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

import sampler
from sampler.stock.stock_calls import couples_rows
from tests import tiny
from tests.families import FAMILIES
from tests.guidance.stock import Rows

pytestmark = pytest.mark.filterwarnings("ignore")
CFG = {"name": "cfg", "scale": 3.0}
APG = {"name": "apg", "scale": 9.0, "norm_threshold": 2.0}
OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "submodules": lambda pipe: cpu_offload(pipe.unet, torch.device("cpu")),
}


def run(pipe, scale=8.0, **options):
    return pipe(
        "a fox",
        num_inference_steps=4,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **options,
    ).images


@pytest.fixture
def pipe():
    return tiny.sd()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_every_call_of_an_offloaded_pipeline_is_guided(pipe, offload):
    """diffusers builds the offloading hooks again after every call (diffusers #2907, #7448)."""
    guided, plain = run(pipe, 3.0), run(pipe)
    OFFLOADS[offload](pipe)
    with sampler.guide(pipe, CFG):
        assert all(torch.equal(run(pipe), guided) for _ in range(3))
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_that_is_enabled_inside_leaves_no_guidance_behind(pipe, offload):
    guided, plain = run(pipe, 3.0), run(pipe)
    with sampler.guide(pipe, CFG):
        OFFLOADS[offload](pipe)
        assert torch.equal(run(pipe), guided) and torch.equal(run(pipe), guided)
    assert torch.equal(run(pipe), plain)
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe), plain)


def test_offload_that_is_removed_inside_keeps_the_guidance(pipe):
    guided, plain = run(pipe, 3.0), run(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with sampler.guide(pipe, CFG):
        pipe.remove_all_hooks()
        assert torch.equal(run(pipe), guided)
    assert torch.equal(run(pipe), plain)


def test_engines_on_the_same_pipeline_are_not_guided(pipe):
    engine = sampler.load(pipe)
    settings = dict(seeds=3, steps=4, guidance=CFG, output="latent")
    expected = engine.generate("a", **settings).latents
    with sampler.guide(pipe, {**CFG, "scale": 9.0}):
        run(pipe)
        assert torch.equal(engine.generate("a", **settings).latents, expected)
        loaded_inside = sampler.load(pipe)
        assert torch.equal(loaded_inside.generate("a", **settings).latents, expected)


def test_pipelines_that_share_a_network_have_their_own_rules(pipe):
    other = StableDiffusionPipeline(**{**pipe.components, "scheduler": tiny.sd().scheduler})
    other.set_progress_bar_config(disable=True)
    three, five, plain = run(pipe, 3.0), run(pipe, 5.0), run(pipe)
    with sampler.guide(pipe, CFG):
        assert torch.equal(run(other), plain)
        with sampler.guide(other, {**CFG, "scale": 5.0}):
            assert torch.equal(run(pipe), three) and torch.equal(run(other), five)
        assert torch.equal(run(pipe), three) and torch.equal(run(other), plain)


def test_contexts_may_end_in_any_order(pipe):
    other = StableDiffusionPipeline(**{**pipe.components, "scheduler": tiny.sd().scheduler})
    other.set_progress_bar_config(disable=True)
    five, plain = run(pipe, 5.0), run(pipe)
    first, second = sampler.guide(pipe, CFG), sampler.guide(other, {**CFG, "scale": 5.0})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(run(pipe), plain) and torch.equal(run(other), five)
    second.__exit__(None, None, None)
    assert torch.equal(run(pipe), plain) and torch.equal(run(other), plain)


def test_a_network_that_is_replaced_inside_is_an_error(pipe):
    with sampler.guide(pipe, CFG):
        pipe.unet = copy.deepcopy(tiny.sd().unet)
        with pytest.raises(ValueError, match="step without a guided call of its unet"):
            run(pipe)


def test_a_scheduler_that_is_replaced_inside_gives_its_own_levels(pipe):
    euler = tiny.sd(scheduler=EulerDiscreteScheduler(**tiny.BETAS))
    with sampler.guide(euler, APG):
        expected = run(euler)
    with sampler.guide(pipe, APG):
        run(pipe)
        pipe.scheduler = EulerDiscreteScheduler(**tiny.BETAS)
        assert torch.equal(run(pipe), expected)


def test_copies_made_inside_are_not_guided(pipe):
    plain = run(pipe)
    with sampler.guide(pipe, CFG):
        network = copy.deepcopy(pipe.unet)
    pipe.unet = network
    assert torch.equal(run(pipe), plain)


def test_the_objects_have_their_classes_back(pipe, tmp_path):
    parts = (pipe, pipe.unet, pipe.scheduler)
    before = [type(part) for part in parts]
    with pytest.raises(KeyboardInterrupt), sampler.guide(pipe, CFG):
        pipe.save_pretrained(tmp_path)

        def stop(*_):
            raise KeyboardInterrupt

        run(pipe, callback_on_step_end=stop)
    assert [type(part) for part in parts] == before
    saved = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert [type(part) for part in (saved, saved.unet, saved.scheduler)] == before


def test_calls_with_gradients_are_guided(pipe):
    pipe.unet.requires_grad_()
    with sampler.guide(pipe, CFG):
        expected = run(pipe)
        call = type(pipe).__call__.__wrapped__
        latents = call(
            pipe,
            "a fox",
            num_inference_steps=4,
            guidance_scale=8.0,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
    assert latents.requires_grad and torch.allclose(latents, expected, atol=1e-5)


def test_a_pipeline_without_its_first_network_is_guided_by_the_second():
    wan = FAMILIES["Wan (text to video)"].build()
    wan.transformer_2, wan.transformer = wan.transformer, None
    with sampler.guide(wan, CFG) as calls:
        assert calls.networks == [wan.transformer_2]
    with pytest.raises(sampler.SamplerError, match="has no transformer"):
        sampler.load(wan)
    wan.transformer_2 = None
    with pytest.raises(sampler.SamplerError, match="no transformer to guide"):
        with sampler.guide(wan, CFG):
            pass


@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_compiled_networks_are_guided(pipe, compiled):
    guided, plain = run(pipe, 3.0), run(pipe)
    if compiled == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    before = type(pipe.unet)
    with sampler.guide(pipe, CFG):
        assert torch.allclose(run(pipe), guided, atol=1e-4)
    assert type(pipe.unet) is before and torch.allclose(run(pipe), plain, atol=1e-4)


def test_two_calls_at_once_are_refused(pipe):
    with sampler.guide(pipe, CFG):

        def again(*_):
            run(pipe)

        with pytest.raises(ValueError, match="already being called"):
            run(pipe, callback_on_step_end=again)
        results, reached, go_on = [], threading.Event(), threading.Event()

        def wait(_pipe, _step, _t, kwargs):
            reached.set()
            go_on.wait(60)
            return kwargs

        thread = threading.Thread(
            target=lambda: results.append(run(pipe, callback_on_step_end=wait))
        )
        thread.start()
        assert reached.wait(60)
        with pytest.raises(ValueError, match="one pipeline per thread"):
            run(pipe)
        go_on.set()
        thread.join()
    assert torch.equal(results[0], run(pipe, CFG["scale"]))


def test_the_rows_of_other_callers_are_not_counted(pipe):
    counted = Rows(pipe.unet)
    with sampler.guide(pipe, CFG) as calls:
        run(pipe)
        sampler.load(pipe).generate("a", seeds=1, steps=3, guidance="cfg", output="latent")
    assert calls.nfe == [8] and sum(counted.rows) == 8 + 6


def test_a_pipeline_that_was_guided_is_freed(pipe):
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with sampler.guide(other, CFG):
        run(other)
    kept = weakref.ref(other)
    del other
    gc.collect()
    assert kept() is None


def test_processors_of_a_class_may_couple_rows():
    class Foreign:
        """Stands for an attention processor that diffusers does not ship."""

    class Layer(torch.nn.Module):
        @property
        def processor(self):
            return Foreign()

    assert couples_rows(torch.nn.Sequential(Layer()))
    assert not couples_rows(tiny.sd().unet)
