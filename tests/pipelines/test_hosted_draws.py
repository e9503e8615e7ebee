"""Hosted pipelines whose language model draws tokens, and whose network keeps a cache."""

import pytest
import torch

import sampler
from sampler import registry
from sampler.engine.hosted import HostedEngine
from tests.classic.table import TINY
from tests.guidance.stock import Rows
from tests.guidance.stock_hosted import picture
from tests.laws.world import Rests

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "GlmImagePipeline"
SIZE = {"height": 32, "width": 32}
CFG = {"name": "cfg", "scale": 3.0}


def test_an_image_does_not_depend_on_the_draws_of_its_batch(caplog):
    pipe = TINY[NAME].build(NAME)
    shared = {"steps": 2, "sampler": "ddim", "guidance": CFG, "output": "latent", **SIZE}
    both = HostedEngine(pipe).generate(["a fox", "a cat"], seeds=[1, 2], **shared).latents
    assert sum("one at a time" in record.message for record in caplog.records) == 1
    for k, prompt in enumerate(("a fox", "a cat")):
        stock = pipe(
            prompt, num_inference_steps=2, guidance_scale=3.0, output_type="latent", **SIZE,
            generator=torch.Generator().manual_seed(k + 1),
        ).images  # fmt: skip
        assert torch.allclose(both[k], stock[0], atol=1e-5)


def test_a_call_with_a_cache_of_the_whole_batch_is_evaluated_in_full():
    pipe = TINY[NAME].build(NAME)
    counted = Rows(pipe.transformer)
    with sampler.guide(pipe, Rests(registry.build("guidance", CFG))):
        pipe(
            ["a fox", "a cat"], image=[[picture(1)], [picture(2)]], num_inference_steps=4, **SIZE,
            guidance_scale=3.0, num_images_per_prompt=2, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert set(counted.rows) == {1, 4}  # of the images that are given, and of all
