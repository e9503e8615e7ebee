"""`sampler inspect features | attention | basis`: inspection of a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sampler.cli.inspect_prior import prior
from sampler.cli.inspect_sets import loss, memory, realism
from sampler.cli.inspect_shared import Limit, Out, Row, Shares, finish, read_images
from sampler.cli.options import Debug, Json, ModelOptions, Quiet, expanded, takes_model_options
from sampler.cli.report import Report

if TYPE_CHECKING:
    from torch import Tensor

Source = Annotated[
    str, typer.Option("--images", metavar="DIR", help="Run folder or folder of images.")
]
Prompt = Annotated[str, typer.Option(help="Prompt given to the network.")]


@takes_model_options(leave_out=("drop_encoders",))
def features(
    images: Source,
    labels: Annotated[
        Path,
        typer.Option(
            metavar="FILE", callback=expanded, help="CSV: column file, and columns of labels."
        ),
    ],
    t: Shares = None,
    block: Annotated[
        list[str] | None, typer.Option(help="Block (up.0, mid, blocks.3); default: all.")
    ] = None,
    pool: Annotated[int, typer.Option(min=1, help="Cells per side of the pooling grid.")] = 2,
    limit: Limit = 1000,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Read labels of images from the features of each block by ridge regression.

    Seven of ten images fit the probes, the others test them, with 95 % intervals. Baselines in the
    same table: pooled and raw latents, and the most frequent label.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.models import load_engine, model_config
        from sampler.engine.inspection.classify import block_table
        from sampler.evaluation.image_sets import read_labels

        engine = load_engine(model_config(model))
        found = read_images(images, engine.pipeline, limit, report)
        named = read_labels(labels, found.names)
        chosen = block or engine.pipeline.blocks[1:]
        rows = block_table(engine, found.pixels, named, t or (0.15, 0.45), chosen, pool)
        finish(report, out, "features", rows, {}, {"images": len(found.names), "pool": pool})


@takes_model_options(leave_out=("drop_encoders",))
def attention(
    prompts: Annotated[list[str], typer.Argument(help="Prompts.")],
    word: Annotated[
        list[str] | None, typer.Option(help="Word of the prompts; repeatable; default: all.")
    ] = None,
    score: Annotated[
        str, typer.Option(help="attention, guidance (Grad-SAM), or a differentiable reward.")
    ] = "attention",
    sampler: Annotated[str | None, typer.Option(help="Sampler name.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance rule name.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    n: Annotated[int, typer.Option("-n", min=1, help="Images per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Random seed; image i gets SEED + i.")] = 0,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Generate images with heat maps of where they attend to the words of their prompts.

    Writes a sheet per image, and maps.safetensors with the maps by image and word.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from safetensors.torch import save

        from sampler.cli.models import load_engine, model_config
        from sampler.engine.inspection.attention import table_of
        from sampler.engine.inspection.pictures import overlay, sheet

        engine = load_engine(model_config(model))
        found = engine.attention(
            prompts, word, score=score, sampler=sampler, guidance=guidance, steps=steps, n=n,
            seeds=seed,
        )  # fmt: skip
        texts = [text for text in prompts for _ in range(n)]
        files: dict[str, bytes] = {}
        tensors: dict[str, Tensor] = {}
        for i, (image, maps) in enumerate(zip(found.images, found.maps, strict=True)):
            shown = [image, *(overlay(image, values) for values in maps.values())]
            files[f"{i:06d}.png"] = sheet(texts[i], ["image", *maps], [shown])
            tensors |= {f"{i:06d}/{name}": values.contiguous() for name, values in maps.items()}
        files["maps.safetensors"] = save(tensors)
        facts = {"score": score, "steps": steps, "nfe": found.nfe}
        finish(report, out, "attention", table_of(found, texts), files, facts)


@takes_model_options(leave_out=("drop_encoders",))
def basis(
    images: Source,
    t: Shares = None,
    prompt: Prompt = "",
    signs: Annotated[int, typer.Option(min=2, help="Number of random sign vectors.")] = 24,
    full: Annotated[
        bool, typer.Option("--full", help="Compute the full Jacobian (at most 2,048 elements).")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Images to inspect.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Print trace, asymmetry and leading eigenvalues of the denoiser's Jacobian at images.

    The Jacobian of an exact denoiser is symmetric without negative eigenvalues, and q²·trace is its
    expected squared error. The table also has the true error and Stein's estimate (SURE).
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.models import load_engine, model_config
        from sampler.engine.inspection.denoiser import inspected

        engine = load_engine(model_config(model))
        found = read_images(images, engine.pipeline, limit, report)
        table: list[Row] = []
        files: dict[str, bytes] = {}
        settings = {"signs": signs, "full": full, "seed": seed}
        for i, name in enumerate(found.names[:limit]):
            image, shares = found.pixels[i : i + 1], t or (0.25, 0.6)
            rows, pictures = inspected(engine, image, shares, prompt, **settings)
            table += [{"image": name, **row} for row in rows]
            files |= {f"{i:03d}_{file}": data for file, data in pictures.items()}
        finish(report, out, "basis", table, files, {"prompt": prompt, **settings})


app = typer.Typer(
    help="Inspect a model: features, attention, denoiser, training images.", no_args_is_help=True
)
for _command in (features, attention, basis, memory, realism, loss, prior):
    app.command()(_command)
