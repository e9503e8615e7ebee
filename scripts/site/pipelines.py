"""Write docs/pipelines.md: what works with which classic pipeline class of diffusers.

    python -m scripts.site.pipelines [CLASS...]

Every class that can be built from the parts of the tests' tiny random pipelines is called as it is,
inside `sampler.guide`, with a drop-in scheduler and hosted. With names of classes, their rows are
printed instead.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

import sampler
from sampler.pipelines import supported
from sampler.pipelines.call_arguments import RESERVED, arguments, embeds_scale, takes_images
from tests import tiny
from tests import tiny_transformers as tiny2
from tests.guidance import stock_hosted

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
PARTS: dict[str, Callable[[], Any]] = {
    "sd": tiny.sd,
    "controlnet": stock_hosted.controlnet,
    "pix2pix": stock_hosted.pix2pix,
    "sdxl": tiny.sdxl,
    "kolors": tiny2.kolors,
    "pixart": tiny.pixart,
    "pixart alpha": tiny.pixart_alpha,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
    "flux 2": tiny2.flux2,
    "klein": tiny2.klein,
    "qwen": tiny2.qwen_image,
    "aura flow": tiny2.aura_flow,
    "sana": tiny2.sana,
    "lumina 2": tiny2.lumina2,
    "z-image": tiny2.z_image,
    "hunyuan dit": tiny2.hunyuan_dit,
    "dit": tiny.dit,
    "wan": tiny2.wan,
    "lcm": tiny2.lcm,
    "ddim": tiny2.ddim,
    "ddpm": tiny2.ddpm,
    "consistency": tiny2.consistency,
}
LARGE = ("Kontext", "Edit", "Layered", "Fibo")  # they resize images to a megapixel
NETWORKS = ("unet", "transformer", "controlnet")
HEAD = """# Pipelines

<!-- written by `python -m scripts.site.pipelines`; a test makes a sample of the rows again -->

Classic pipeline classes of diffusers @version@, each tried on a tiny random pipeline (CPU, float32)
that is built from the parts of this project's tests. Classes whose parts are not among them, and
those that resize every image to a megapixel, are not in the table; they are served by the same
code, since nothing here goes by the name of a class.

- **engine**: *native* (an adapter of its own, [families](families.md)) or *hosted*
  (`sampler.load` calls the pipeline itself, with `ghvb`).
- **guide**: `sampler.guide` with `cfg` at the pipeline's own scale gives its own images (1e-5).
- **scheduler**: `sampler.scheduler("ab", ...)` in the pipeline makes finite images.
- **image inputs**: for `generate(..., inputs={...})` and `--input NAME=FILE`.

@counts@

| class | engine | guide | scheduler | image inputs |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """Row of the table; cells hold "yes", a kind of engine, or the reason against it."""

    name: str
    engine: str
    guide: str
    scheduler: str
    inputs: tuple[str, ...]

    def __str__(self) -> str:
        inputs = ", ".join(f"`{name}`" for name in self.inputs)
        return f"| `{self.name}` | {self.engine} | {self.guide} | {self.scheduler} | {inputs} |\n"


@lru_cache(maxsize=1)
def parts() -> dict[str, dict[str, Any]]:
    """Components of the tiny pipelines, to see what fits."""
    return {name: build().components for name, build in PARTS.items()}


def classes() -> Iterator[type]:
    """Exported pipeline classes that are called with prompts or images."""
    for name in sorted(dir(diffusers)):
        if not name.endswith("Pipeline") or name.startswith(("Onnx", "Flax", "Auto", "Modular")):
            continue
        cls = getattr(diffusers, name)
        if (
            isinstance(cls, type)
            and "deprecated" not in cls.__module__
            and not any(part in name for part in LARGE)
        ):
            yield cls


def built(cls: type) -> Iterator[Any]:
    """Tiny pipelines of the class, each from fresh parts; none where its parts are not ours."""
    wanted = {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}
    for recipe, found in parts().items():
        given = {name: found[name] for name in wanted if name in found}
        absent = {n for n, p in wanted.items() if n not in given and p.default is p.empty}
        free = {"safety_checker", "feature_extractor", "image_encoder"} & absent
        if absent - free or not _fits(wanted, given):
            continue
        fresh = PARTS[recipe]().components
        own = {**{name: fresh[name] for name in given}, **dict.fromkeys(free)}
        if "requires_safety_checker" in wanted:
            own["requires_safety_checker"] = False
        try:
            pipe = cls(**own)
        except (TypeError, ValueError, AttributeError):
            continue
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def _fits(wanted: dict[str, inspect.Parameter], given: dict[str, Any]) -> bool:
    """True if the networks are of the classes in the annotations."""
    for name in NETWORKS:
        if name in wanted and given.get(name) is not None:
            hint, kind = str(wanted[name].annotation), type(given[name]).__name__
            if "Model" in hint and kind not in hint:
                return False
    return True


def inputs_of(cls: type) -> dict[str, Any]:
    """Images for the arguments of the call that take them."""
    known = arguments(cls)
    own: dict[str, Any] = {}
    for name in known:
        takes_image = name in ("image", "control_image", "image_2", "original_image")
        if takes_image and name not in RESERVED:
            own[name] = stock_hosted.picture(1)
        elif name == "mask_image":
            own[name] = stock_hosted.half_mask()
        elif name == "video":
            own[name] = [stock_hosted.picture(k) for k in range(5)]
    return own


def settings_of(cls: type) -> dict[str, Any]:
    """Arguments of a plain call beside the inputs."""
    known = arguments(cls)
    wanted: dict[str, Any] = {"prompt": "a red fox", "negative_prompt": "ugly", "height": 32}
    wanted |= {"width": 32, "num_inference_steps": 3, "num_frames": 5, "class_labels": [3]}
    wanted |= {"output_type": "pt", "use_resolution_binning": False, "clean_caption": False}
    wanted["true_cfg_scale"] = 3.0
    if not embeds_scale(cls):
        wanted["guidance_scale"] = 3.0
    return {name: value for name, value in wanted.items() if name in known}


def called(pipe: Any) -> torch.Tensor:
    """Result of one call, the same at every time."""
    given = {**settings_of(type(pipe)), **inputs_of(type(pipe))}
    if "generator" in arguments(type(pipe)):
        given["generator"] = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    value = pipe(**given).to_tuple()[0]
    return torch.as_tensor(np.asarray(value) if isinstance(value, list) else value).double()


def guide(pipe: Any, plain: torch.Tensor) -> str:
    """ "yes" where the rule at the pipeline's own scale gives its images; else the reason."""
    with sampler.guide(pipe, {"name": "cfg", "scale": 3.0}) as calls:
        called(pipe)
    if calls.form is None:
        return "no step was taken"
    rule: dict[str, Any] = {"name": "cfg", "scale": calls.form.scale}
    if calls.form.token is not None:
        rule["match_norm"] = [-1]
    with sampler.guide(pipe, rule):
        found = called(pipe)
    gap = float((found - plain).abs().max() / plain.abs().max().clamp_min(1e-9))
    note = " (with `match_norm`)" if calls.form.token is not None else ""
    return f"yes{note}" if gap <= 1e-5 else f"differs by {gap:.0e}"


def drop_in(pipe: Any, _: torch.Tensor) -> str:
    """ "yes" where a drop-in scheduler makes finite images."""
    before = pipe.scheduler
    try:
        pipe.scheduler = sampler.scheduler("ab", before)
        return "yes" if called(pipe).isfinite().all() else "not finite"
    finally:
        pipe.scheduler = before


def engine(pipe: Any, _: torch.Tensor) -> str:
    """Kind of the engine of the class, after a call of the hosted one."""
    cls = type(pipe)
    more = {n: v for n, v in settings_of(cls).items() if n not in RESERVED}
    known = arguments(cls)
    size = {name: 32 for name in ("height", "width") if name in known}
    made = sampler.load(pipe)
    native = "" if made.hosted else "native, "
    hosted: Any = made.as_hosted()
    prompt = "a red fox" if "prompt" in known else "3" if "class_labels" in known else ""
    hosted.generate(
        prompt, seeds=1, steps=3, sampler="ghvb", inputs={**inputs_of(cls), **more}, **size
    )
    return native + "hosted"


def tried(attempt: Callable[[Any, torch.Tensor], str], pipe: Any, plain: torch.Tensor) -> str:
    try:
        return attempt(pipe, plain)
    except (ValueError, sampler.SamplerError) as error:
        text = str(error).replace("|", "/").replace("\n", " ")
        return text if len(text) < 200 else text[:180].rsplit(" ", 1)[0] + " …"
    except Exception as error:  # a reason that is no sentence of ours is a fault worth seeing
        return f"**{type(error).__name__}**"


def row(cls: type) -> Row | None:
    """Row of a class; None where it cannot be built or called tiny."""
    for pipe in built(cls):
        try:
            return _row(pipe, called(pipe))
        except Exception as error:  # parts of another form, optional packages
            sys.stderr.write(f"{cls.__name__}: {type(error).__name__}: {error!s:.100}\n")
    return None


def _row(pipe: Any, plain: torch.Tensor) -> Row:
    cls = type(pipe)
    cells = [tried(attempt, pipe, plain) for attempt in (engine, guide, drop_in)]
    if cls.__name__ in supported() and not cells[0].startswith("native"):
        cells[0] = f"native; hosted: {cells[0]}"
    engine_kind, guided, dropped = cells
    return Row(
        cls.__name__, engine_kind, guided, dropped, tuple(filter(takes_images, arguments(cls)))
    )


def page(rows: list[Row]) -> str:
    """The document."""
    served = sum(one.guide.startswith("yes") for one in rows)
    hosted = sum("hosted" in one.engine and ":" not in one.engine for one in rows)
    dropped = sum(one.scheduler == "yes" for one in rows)
    counts = (
        f"{len(rows)} classes: {hosted} hosted, {served} guided, {dropped} with a drop-in "
        "scheduler; every other cell holds the reason."
    )
    head = HEAD.replace("@version@", diffusers.__version__).replace("@counts@", counts)
    return head + "".join(map(str, rows))


def main(names: list[str]) -> None:
    """Write the page, or print the rows of some classes."""
    warnings.simplefilter("ignore")
    chosen = [cls for cls in classes() if not names or cls.__name__ in names]
    rows: list[Row] = []
    for cls in chosen:
        sys.stderr.write(f"{cls.__name__}\n")
        if (found := row(cls)) is not None:
            rows.append(found)
    if names:
        sys.stdout.writelines(map(str, rows))
    else:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
