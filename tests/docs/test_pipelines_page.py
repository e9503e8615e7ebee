"""docs/pipelines.md: a sample of its rows is made again; the script makes all."""

import diffusers
import pytest

from scripts.site.pipelines import PAGE, classes, row

SAMPLE = (
    "FluxImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "QwenImageInpaintPipeline",
    "SanaPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInpaintPipeline",
    "ZImageImg2ImgPipeline",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_is_what_the_script_finds(name):
    assert str(row(getattr(diffusers, name))) in PAGE.read_text(encoding="utf-8")


def test_every_row_is_of_an_exported_class():
    names = {cls.__name__ for cls in classes()}
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    found = [line.split("`")[1] for line in lines]
    assert set(found) <= names and len(found) == len(set(found)) >= 40
    assert not any("**" in line for line in lines)  # every reason is a sentence
