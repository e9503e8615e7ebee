"""`sampler generate`: prompts to PNG files, batch by batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import Debug, Json, Quiet, Verbose
from sampler.cli.report import Report

if TYPE_CHECKING:
    from sampler.config import Config


def command(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...")] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE", help="A .txt file, one prompt a line; - is stdin."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Folder for the images.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Images per prompt.")] = None,
    seed: Annotated[int | None, typer.Option(help="Image i of the run has seed + i.")] = None,
    steps: Annotated[int | None, typer.Option(help="Network evaluations, 1 to 1000.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Its name; see `sampler list`.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Its name; see `sampler list`.")] = None,
    negative: Annotated[str | None, typer.Option(help="What the images should not show.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Images at a time, or auto.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; default: bundled.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option("-c", "--config", help="YAML file; later ones win.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Any configuration key.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a model that is not in the local cache.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make images from prompts with a diffusion model; the bundled one by default."""
    report = Report(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with report.errors():
        from sampler.cli.images import check_folder, make_images
        from sampler.cli.models import load_engine

        given = {
            "--negative": ("run.negative_prompt", negative),
            "--out": ("output.dir", out),
            "-n": ("run.n", n),
            "--seed": ("run.seed", seed),
            "--steps": ("run.steps", steps),
            "--width": ("run.width", width),
            "--height": ("run.height", height),
            "--sampler": ("sampler", sampler),
            "--guidance": ("guidance", guidance),
            "--batch-size": ("run.batch_size", _number_or_text(batch_size)),
            "--model": ("model.path", model),
            "--device": ("model.device", device),
            "--dtype": ("model.dtype", dtype),
        }
        settings = _settings(config or [], sets or [], given)
        texts = _prompts(settings, prompts or [], prompts_file)
        check_folder(Path(settings.output.dir))
        make_images(settings, texts, load_engine(settings.model, download), report)


def _settings(files: list[Path], sets: list[str], given: dict[str, tuple[str, Any]]) -> Config:
    import os

    from sampler import layers

    lower = [layers.read_file(path) for path in files]
    return layers.resolve(
        [*lower, *layers.from_environment(os.environ)],
        layers.from_sets(sets),
        layers.from_options(given),
    )


def _prompts(settings: Config, arguments: list[str], file: str | None) -> list[str]:
    """Those of the command line, arguments first; without any, those of the configuration."""
    from sampler.runs.prompts import check_prompt, read_prompts
    from sampler.types import SamplerError

    texts, source = arguments, file
    if not texts and source is None:
        texts, source = list(settings.prompts.texts or ()), settings.prompts.file
    checked = [check_prompt(text, f"prompt {i}") for i, text in enumerate(texts, 1)]
    checked += read_prompts(source) if source is not None else []
    if not checked:
        raise SamplerError("No prompts: give them as arguments or with --prompts FILE.txt.", 2)
    return checked


def _number_or_text(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else text
