"""The bundled Stable Diffusion 3: a stock pipeline, trained, beside the bundled model."""

import numpy as np
import pytest
import torch

import sampler
from sampler import bundled
from sampler.bundled import classifier, measures
from sampler.config.model import ModelConfig
from sampler.runs.fingerprint import model_of
from scripts.bundled.sd3_task import load_sd3


@pytest.fixture(scope="module")
def engine():
    return sampler.load("bundled-sd3")


def test_its_images_are_those_of_the_stock_pipeline(engine):
    prompts = ["a fox on a green background", "a pizza on white"]
    ours = engine.generate(prompts, seeds=[3, 4], steps=5)
    stock = load_sd3()(
        prompts,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="np",
    ).images
    for image, other in zip(ours.images, stock, strict=True):
        assert np.abs(np.asarray(image) / 255 - other).max() < 1.5 / 255
    assert list(ours.nfe) == [10, 10]


def test_its_images_show_their_prompts(engine):
    listed = bundled.prompts(16, start=20)
    made = engine.generate([prompt.text for prompt in listed], seeds=range(16), steps=8,
                           sampler={"name": "ab", "order": 2}, output="tensor")  # fmt: skip
    figures = measures.measure(
        classifier.load(), made.images, listed, classifier.reference_statistics()
    )
    assert figures["concept"] >= 0.75 and figures["background"] >= 0.95


def test_it_is_a_model_of_its_own(engine):
    sd3, main = (model_of(ModelConfig(path=path)) for path in ("bundled-sd3", "bundled"))
    assert sd3.identity != main.identity
    assert engine.guidance == sampler.build("guidance", {"name": "cfg", "scale": 3.0})
    assert set(engine.pipeline.networks) == {"main"}
    files = [path for path in (bundled.FOLDER / "sd3").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    with pytest.raises(ValueError, match="student has no effect on bundled-sd3"):
        sampler.load("bundled-sd3", student="somewhere")
