"""Classic pipeline classes of diffusers: guided at their own scale they make their own images.

A sample runs with the suite; `python -m pytest tests/guidance/test_classic.py -m every_class` runs
all, and `python -m scripts.site.pipelines` writes what it finds.
"""

import warnings

import diffusers
import pytest
import torch

import sampler
from scripts.site.pipelines import drop_in, guide, hosted, read, tried
from scripts.site.pipelines_page import GUIDED
from tests.classic.recipe import Recipe
from tests.classic.table import TINY

SAMPLE = """
    AllegroPipeline AnimateDiffControlNetPipeline AnimateDiffPAGPipeline AuraFlowPipeline
    ChromaImg2ImgPipeline CogVideoXImageToVideoPipeline CogView4ControlPipeline
    FluxControlInpaintPipeline FluxControlNetPipeline HunyuanDiTControlNetPipeline
    HunyuanVideoFramepackPipeline I2VGenXLPipeline IFInpaintingSuperResolutionPipeline
    Kandinsky3Pipeline KandinskyImg2ImgPipeline KandinskyV22CombinedPipeline
    KandinskyV22PriorPipeline KolorsPAGPipeline LTXImageToVideoPipeline LattePipeline
    MarigoldDepthPipeline MochiPipeline OvisImagePipeline PaintByExamplePipeline
    QwenImageControlNetPipeline SanaControlNetPipeline SkyReelsV2ImageToVideoPipeline
    StableDiffusion3ControlNetPipeline StableDiffusionAdapterPipeline
    StableDiffusionAttendAndExcitePipeline StableDiffusionControlNetXSPipeline
    StableDiffusionGLIGENTextImagePipeline StableDiffusionPanoramaPipeline
    StableDiffusionSAGPipeline StableDiffusionUpscalePipeline
    StableDiffusionXLControlNetUnionPipeline StableUnCLIPPipeline VisualClozePipeline
    WanVACEPipeline ZImageControlNetInpaintPipeline
""".split()
CELLS = {"guide": guide, "scheduler": drop_in, "hosted": hosted}
ROWS = read()
every = [
    pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.every_class)
    for name in sorted(TINY)
]


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    diffusers.utils.logging.enable_progress_bar()


def test_the_sample_holds_forty_classes_of_many_families():
    assert len(SAMPLE) == len(set(SAMPLE)) == 40 and set(SAMPLE) <= set(TINY)
    assert len({ROWS[name]["family"] for name in SAMPLE}) >= 25


@pytest.mark.parametrize("name", every)
def test_a_class_does_what_its_row_says(name):
    recipe = TINY[name]
    pipe = recipe.build(name)
    plain = recipe.called(pipe)
    assert plain.std() > 1e-4  # else nothing below could fail
    for column, attempt in CELLS.items():
        wanted = ROWS[name][column]
        found = tried(attempt, recipe, pipe, plain)
        if wanted in (*GUIDED, "yes", "equal", "finite"):
            assert found == wanted
        else:  # numbers of a sentence may differ
            assert found.split()[:4] == wanted.split()[:4]
    assert torch.equal(plain, recipe.called(pipe))  # as it was before


def test_another_scale_makes_another_image():
    name = "StableDiffusionSAGPipeline"
    recipe: Recipe = TINY[name]
    pipe = recipe.build(name)
    plain = recipe.called(pipe)
    with sampler.guide(pipe, {"name": "cfg", "scale": 5.0}) as calls:
        other = recipe.called(pipe)
    assert calls.form is not None and calls.form.scale == pytest.approx(3.0, abs=1e-3)
    assert not torch.allclose(other, plain, atol=1e-3)
    stock = recipe.called(pipe, guidance_scale=5.0)
    assert torch.allclose(other, stock, atol=1e-5)
