"""Rules as guiders of Modular Diffusers."""

import pytest
import torch
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

import sampler
from sampler.stock.guider import RuleGuider
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 5


@pytest.fixture(scope="module")
def modular():
    stock = tiny.sdxl()
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("unet", "vae", "scheduler", "tokenizer", "tokenizer_2")
    parts = {n: getattr(stock, n) for n in (*names, "text_encoder", "text_encoder_2")}
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, stock


def run(pipe, guider):
    pipe.update_components(guider=guider)
    return pipe(
        prompt="a fox",
        num_inference_steps=STEPS,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(3),
        output="latents",
    )


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "cfg", "scale": 5.0},
        {"name": "cfg", "scale": 5.0, "window": [0, 2]},
        {"name": "apg", "scale": 5.0, "space": "native", "norm_threshold": 2.0},
        {"name": "adaptive", "rule": {"name": "cfg", "scale": 5.0}, "threshold": 0.9},
    ],
)
def test_a_rule_as_a_guider_is_the_rule_in_the_engine(modular, rule):
    pipe, stock = modular
    calls = []
    handle = stock.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    guider = RuleGuider(rule)
    found = run(pipe, guider)
    handle.remove()
    made = sampler.load(stock).generate(
        "a fox", seeds=3, steps=STEPS, height=32, width=32, guidance=rule, output="latent"
    )
    gap = (found - made.latents).abs().max() / made.latents.abs().max()
    assert gap < 1e-5 and len(calls) == made.nfe[0]
    other = run(pipe, RuleGuider({"name": "cfg", "scale": 1.0}))
    assert (other - found).abs().max() > 1e-3 * found.abs().max()
    assert torch.equal(run(pipe, guider), found)  # a run leaves nothing behind


def test_a_guider_is_saved_and_loaded(tmp_path):
    guider = RuleGuider({"name": "cfg", "scale": 4.0}, prediction="v")
    guider.save_pretrained(tmp_path)
    loaded = RuleGuider.from_pretrained(tmp_path)
    assert loaded.rule == guider.rule and loaded.prediction == "v"


@pytest.mark.parametrize(
    "rule, words",
    [
        ("apg", "space must be 'native'"),
        ("autoguidance", "needs 'weak'"),
        ("gfcg", "bound"),
        ({"name": "cfg", "interval": [0.1, 1.0]}, "interval"),
        ("cfg_zero", "zero start"),
        ({"name": "adaptive", "rule": "apg"}, "space must be 'native'"),
    ],
)
def test_rules_that_need_the_levels_are_refused(rule, words):
    with pytest.raises(ValueError, match=words):
        RuleGuider(rule)
