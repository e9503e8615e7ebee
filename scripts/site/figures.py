"""Pictures and NFE of every strategy for the reference pages, on the bundled model.

    python -m scripts.site.figures pictures [KIND_NAME ...]    docs/figures/reference/KIND_NAME.png
    python -m scripts.site.figures count                       docs/figures/reference/rows.csv

Settings are those of docs/reference/notes.yaml; each takes about a minute of one core. What needs
the bundled student is left out, and said, where there is none.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sampler
from sampler import registry
from scripts.site.papers import ROOT
from scripts.site.reference import FIGURES, note, run_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PROMPTS = (
    "a fox on a green background",
    "a robot on an orange background",
    "a red apple on a white background",
    "a penguin on a sky blue background",
)
SEED = 10
POOL, POOL_STEPS = 24, 8  # images that a reward sorts; without guidance they differ most
SHOWN = (0, 4, 9, 14, 19, 23)  # which of the sorted ones
ENLARGED, GAP = 2, 4
STEP = 255 / 63  # between the values of a channel: six bits keep the files small
LONG = (
    "adaptive",
    "linear_ag",
    "forecast",
)  # rules that decide by the step, or are fitted for the whole run
SHORT = 4  # steps of the count of all others


@cache
def engine(model: str) -> Any:
    """The bundled model, or one of its students by name."""
    return sampler.load(model)


def settings(kind: str, name: str) -> tuple[str, dict[str, Any]]:
    """(model, arguments of `generate`) of a strategy."""
    run = run_of(kind, name)
    model = run.pop("model", "bundled")
    if name == "reddiff":
        spec = run["sampler"]
        operator = {**spec["operator"], "mask": str(ROOT / spec["operator"]["mask"])}
        run["sampler"] = {**spec, "operator": operator, "y": str(ROOT / spec["y"])}
    if name == "blend":
        files = {key: str(ROOT / run["guidance"][key]) for key in ("image", "mask")}
        run["guidance"] = run["guidance"] | files
    return model, run


def names() -> Iterator[tuple[str, str]]:
    """List what the bundled models can demonstrate; other rewards need published weights."""
    for kind in ("sampler", "guidance", "reward"):
        for name in registry.names(kind):
            shown = kind != "reward" or "run" in note(kind, name)
            if shown and "no_figure" not in note(kind, name):
                yield kind, name


def picture(kind: str, name: str) -> list[Image.Image]:
    """The images of a strategy, left to right."""
    if kind == "reward":
        return by_score(run_of(kind, name)["reward"])
    model, run = settings(kind, name)
    if name == "reddiff":
        return restored(model, run)
    return engine(model).generate(PROMPTS, seeds=SEED, **run).images


def restored(model: str, run: dict[str, Any]) -> list[Image.Image]:
    """An image whose masked part is grey, and restorations from two seeds."""
    from PIL import Image

    image = Image.open(run["sampler"]["y"]).convert("RGB")
    mask = Image.open(run["sampler"]["operator"]["mask"]).convert("L")
    image.paste((128, 128, 128), (0, 0), mask)
    made = engine(model).generate("a red apple on a blue background", n=2, seeds=SEED, **run)
    return [image, *made.images]


@cache
def pool() -> tuple[list[str], Tensor]:
    """Return (prompts, images [B, 3, H, W]) for the rewards to rank."""
    from sampler.bundled import prompts

    texts = [prompt.text for prompt in prompts(POOL)]
    run = {"steps": POOL_STEPS, "guidance": "none", "output": "tensor"}
    return texts, engine("bundled").generate(texts, seeds=SEED, **run).images


def by_score(spec: Any) -> list[Image.Image]:
    """Images of the pool, from the lowest score to the highest."""
    from sampler.core.batch import to_output
    from sampler.rewards.scoring import score

    texts, images = pool()
    order = score(registry.build("reward", spec), images, texts).argsort().tolist()
    return to_output(images[[order[place] for place in SHOWN]], "pil")


def joined(images: Sequence[Image.Image]) -> Image.Image:
    """Images side by side, enlarged, with six bits a channel."""
    from PIL import Image

    width, height = (side * ENLARGED for side in images[0].size)
    sheet = Image.new("RGB", ((width + GAP) * len(images) - GAP, height), (250, 250, 248))
    for place, image in enumerate(images):
        large = image.resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(large, (place * (width + GAP), 0))
    return sheet.point([round(round(v / STEP) * STEP) for v in range(256)] * 3)


def pictures(wanted: Sequence[str]) -> None:
    """Writes the pictures of all strategies, or of those that are named."""
    for kind, name in names():
        if wanted and f"{kind}_{name}" not in wanted:
            continue
        images = picture(kind, name)
        if not images:
            print(f"{kind} {name}: left out, its model is not there")
            continue
        joined(images).save(ROOT / FIGURES / f"{kind}_{name}.png", optimize=True)


def counts() -> Iterator[dict[str, Any]]:
    """Count the NFE of one image for every sampler (unguided) and rule."""
    for kind in ("sampler", "guidance"):
        for name in registry.names(kind):
            if "no_figure" in note(kind, name):
                continue
            model, run = settings(kind, name)
            if name not in LONG:
                run["steps"] = min(SHORT, run["steps"])
            if kind == "sampler" and model == "bundled":
                run["guidance"] = "none"
            made = engine(model).generate(PROMPTS[0], seeds=SEED, output="latent", **run)
            yield {"kind": kind, "name": name, "steps": run["steps"], "rows": made.nfe[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["pictures", "count"])
    parser.add_argument("names", nargs="*", help="pictures to make, as KIND_NAME; all by default")
    options = parser.parse_args()
    (ROOT / FIGURES).mkdir(parents=True, exist_ok=True)
    if options.what == "pictures":
        return pictures(options.names)
    rows = list(counts())
    with (ROOT / FIGURES / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return None


if __name__ == "__main__":
    main()
