"""`sampler inspect memory | realism | loss`: a model against sets of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.inspect_shared import Limit, Out, Row, Shares, finish, read_images
from sampler.cli.options import Debug, Json, ModelOptions, Quiet, takes_model_options
from sampler.cli.report import Report

if TYPE_CHECKING:
    from torch import Tensor

FEATURES = "blocks (of the model), classifier (bundled), spectrum, or an encoder's folder."
SHEET = 12  # rows of a sheet


@takes_model_options(leave_out=("drop_encoders",))
def memory(
    samples: Annotated[
        str, typer.Option(metavar="DIR", help="Generated images: run folder or folder.")
    ],
    training: Annotated[
        str, typer.Option(metavar="DIR", help="Training images: run folder or folder.")
    ],
    features: Annotated[str, typer.Option(help=FEATURES)] = "blocks",
    other: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The same model trained on the other half of the data."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps for --other.")] = 20,
    limit: Limit = 1000,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Print the distance of each sample to the nearest and second nearest training image.

    A copy has a first distance near 0 and a much larger second one. With --other also the cosine of
    the latents of both models for equal noise and prompts: near 1 for models that generalise.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.models import load_engine, model_config
        from sampler.engine.inspection.memory import agreement, nearest
        from sampler.engine.inspection.pictures import sheet

        engine = load_engine(model_config(model))
        twin = other and load_engine(model_config({**model, "path": other}))
        extract = _extractor(engine, features)
        made = read_images(samples, engine.pipeline, limit, report)
        known = read_images(training, engine.pipeline, limit, report)
        found = nearest(_over(extract, made.pixels), _over(extract, known.pixels))
        table: list[Row] = [
            {
                "sample": name, "nearest": known.names[int(found.index[i])],
                "first": float(found.first[i]), "second": float(found.second[i]),
                "ratio": float(found.first[i] / found.second[i].clamp(min=1e-12)),
            }
            for i, name in enumerate(made.names)
        ]  # fmt: skip
        order = sorted(range(len(table)), key=lambda i: (table[i]["ratio"], table[i]["first"]))
        shown = order[:SHEET]
        pairs = [[made.pixels[i], known.pixels[int(found.index[i])]] for i in shown]
        names = [f"{table[i]['first']:.3g} / {table[i]['second']:.3g}" for i in shown]
        columns = ["sample", "nearest"]
        files = {"memory.png": sheet("smallest ratios of distances", columns, pairs, names)}
        facts: dict[str, Any] = {"features": features}
        if twin:
            prompts = [text or "" for text in made.prompts]
            cosines = agreement(engine, twin, prompts, steps=steps)
            for row, value in zip(table, cosines.tolist(), strict=True):
                row["agreement"] = value
            facts["agreement"] = round(float(cosines.mean()), 4)
            report.note(f"Mean agreement of the two models: {facts['agreement']}.")
        finish(report, out, "memory", [table[i] for i in order], files, facts)


@takes_model_options(leave_out=("drop_encoders",))
def realism(
    real: Annotated[str, typer.Option(metavar="DIR", help="Real images.")],
    generated: Annotated[
        str, typer.Option(metavar="DIR", help="Generated images: run folder or folder.")
    ],
    features: Annotated[list[str] | None, typer.Option(help=f"{FEATURES} Repeatable.")] = None,
    limit: Limit = 1000,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Print the share of images that a linear probe separates from real ones, with two controls.

    Controls: other real images (0.5 is chance), and real images through the model's autoencoder,
    whose artefacts are not due to the sampler. Heat maps show the evidence for generated images.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.models import load_engine, model_config
        from sampler.engine.inspection import realism as inspection
        from sampler.engine.inspection.pictures import overlay, sheet

        engine = load_engine(model_config(model))
        first = read_images(real, engine.pipeline, limit, report).pixels
        second = read_images(generated, engine.pipeline, limit, report).pixels
        table: list[Row] = []
        files: dict[str, bytes] = {}
        for name in features or ["classifier", "spectrum"]:
            extract = _extractor(engine, name)
            shares, probe = inspection.realism(engine, first, second, lambda x: _over(extract, x))  # noqa: B023
            table += inspection.table_of(shares, name)
            some = second[:SHEET]
            maps = inspection.evidence(engine, some, probe, name)
            if maps is None:
                report.note(
                    f"{name}: these features have no spatial positions, so no heat map is drawn."
                )
                continue
            pairs = [[image, overlay(image, v)] for image, v in zip(some, maps, strict=True)]
            title = f"bright: evidence for generated, {name}"
            files[f"realism_{name}.png"] = sheet(title, ["image", "evidence"], pairs)
        finish(report, out, "realism", table, files, {})


@takes_model_options(leave_out=("drop_encoders",))
def loss(
    images: Annotated[str, typer.Option("--images", metavar="DIR", help="Images with prompts.")],
    t: Shares = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    limit: Limit = 256,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Print the denoising error per noise level, beside the best linear denoiser's and guidance's.

    Prompts are those of a run, of metadata.jsonl or of text files; without them the network is
    evaluated without a prompt, and the guidance gap is left out.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.models import load_engine, model_config
        from sampler.engine.inspection.loss import SHARES
        from sampler.engine.inspection.loss import loss as measured
        from sampler.engine.inspection.pictures import curves

        engine = load_engine(model_config(model))
        found = read_images(images, engine.pipeline, limit, report)
        prompts = [text for text in found.prompts if text is not None]
        whole = len(prompts) == len(found.prompts)
        if not whole:
            missing = len(found.prompts) - len(prompts)
            report.note(f"{missing} images have no prompt: the network is evaluated without one.")
        table = measured(engine, found.pixels, prompts if whole else None, t or SHARES, seed)
        lines = {
            name: ([row["q"] for row in table], [row[name] for row in table])
            for name in ("error", "wiener", "gap")
        }
        title = "squared error per element of the latents"
        picture = curves(title, lines, "sigma/alpha", "error", logarithmic=True)
        facts = {"images": len(found.names), "seed": seed, "prompts": whole}
        finish(report, out, "loss", table, {"loss.png": picture}, facts)


def _extractor(engine: Any, name: str) -> Callable[[Tensor], Tensor]:
    """Features of images by name, or by the folder of an encoder."""
    from sampler.engine.inspection.realism import log_spectrum
    from sampler.evaluation.features import BUNDLED, Extractor

    if name == "spectrum":
        return log_spectrum
    if name == "blocks":
        return lambda images: next(iter(engine.features(images, pool=1).values()))
    return Extractor(BUNDLED if name == "classifier" else name)


def _over(extract: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Features of images, 32 at a time."""
    import torch

    with torch.no_grad():
        return torch.cat([extract(part) for part in images.split(32)])
