"""Options of `sampler generate` for images that go into a run."""

from __future__ import annotations

from typing import Annotated

from sampler.cli.options import image_option
from sampler.config.options import Task

TaskName = Annotated[Task | None, image_option("--task", help="Restore the image of --image.")]
TaskImage = Annotated[
    str | None, image_option("--image", metavar="FILE", help="Input image for --task.")
]
MaskImage = Annotated[
    str | None,
    image_option("--mask", metavar="FILE", help="Mask image; white pixels are inpainted."),
]
InitImage = Annotated[
    str | None,
    image_option(
        "--init-image", metavar="FILE", help="Image to start from; with --mask, to inpaint."
    ),
]
Strength = Annotated[
    float | None,
    image_option("--strength", help="Denoising strength for --init-image, up to 1; default: 0.6."),
]
ControlImages = Annotated[
    list[str] | None,
    image_option(
        "--control-image",
        metavar="FILE",
        help="Control image of --controlnet; repeatable, in order.",
    ),
]
ControlScales = Annotated[
    list[float] | None,
    image_option(
        "--control-scale", help="Weight of --controlnet, 0 or more; repeatable, in order."
    ),
]
ImagePrompts = Annotated[
    list[str] | None,
    image_option(
        "--ip-image", metavar="FILE", help="Image prompt of --ip-adapter; repeatable, in order."
    ),
]
Inputs = Annotated[
    list[str] | None,
    image_option(
        "--input",
        metavar="NAME=VALUE",
        help="Argument of the stock pipeline's call, such as image=FILE; repeatable.",
    ),
]
