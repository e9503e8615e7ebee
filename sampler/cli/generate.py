"""`sampler generate` and `sampler sweep`: prompts to a run folder of images, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import Color, Debug, Json, Quiet, Verbose
from sampler.cli.report import Report

if TYPE_CHECKING:
    from sampler.config.schema import Config

SWEEP = """Make images for every combination of the values of --axis, which is repeatable.

NAME is a column of prompt files (steps, seed, guidance), a field of a strategy (guidance.scale), \
or prompt/TEXT, which replaces TEXT in the prompt by each value. VALUES are a,b,c (a comma within \
one is \\,), 1..10, 1..10:2, or 0..1#5 for five evenly spaced. The last axis runs fastest. \
Without --seed all cells have seed 0, so that they differ in the axes alone; `sampler grid` draws \
them with labels.

sampler sweep "a fox" --axis guidance=cfg,apg --axis scale=1..7:2
"""


def command(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE", help="txt, csv, tsv, jsonl or parquet; - is stdin."
        ),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            "--axis", metavar="NAME=VALUES", help="Sweep: a,b,c or 1..10:2 or 0..1#5; repeatable."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Run folder, or a URL.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Images per prompt.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Image i of every prompt has seed + i; else derived.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Network evaluations, 1 to 1000.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Its name; see `sampler list`.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Its name; see `sampler list`.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Restore --image: inpaint, superres, deblur, denoise, hdr, jpeg."),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="What --task restores.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", metavar="FILE", help="White is filled (inpaint).")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What the images should not show.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Images at a time, or auto.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; default: bundled.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="DIR[:WEIGHT]", help="An adapter of finetune; repeatable."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model: a commit or tag.")] = None,
    student: Annotated[
        str | None,
        typer.Option("--student", metavar="DIR", help="A student of finetune; one step."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16.")] = None,
    expand: Annotated[
        str | None, typer.Option(help="{a|b} and __NAME__ in prompts: none, random or all.")
    ] = None,
    wildcards: Annotated[str | None, typer.Option(help="Folder of NAME.txt files.")] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="error or skip.")] = None,
    metadata: Annotated[str | None, typer.Option(help="In the images: full, basic, none.")] = None,
    name_template: Annotated[
        str | None, typer.Option(help="Of {index} {key} {seed} {slug} {sampler} {axis:NAME} ...")
    ] = None,
    dedupe: Annotated[
        bool | None, typer.Option("--dedupe/--no-dedupe", help="Make equal images once.")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Stop at the first image that fails.")
    ] = None,
    max_errors: Annotated[int | None, typer.Option(help="Stop beyond so many.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option("-c", "--config", help="YAML, TOML, JSON; later ones win.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Shipped settings, below those of -c: classic or draft.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Any configuration key.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell the plan; load nothing.")
    ] = False,
    new: Annotated[bool, typer.Option("--new", help="A new folder, whatever is there.")] = False,
    executor: Annotated[str, typer.Option(help="local, torchrun or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default: local.")] = None,
    fingerprint: Annotated[str, typer.Option(help="full, or fast: a part of each file.")] = "full",
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a model that is not in the local cache.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="No network, whatever a library may want.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    color: Color = "auto",
) -> None:
    """Make images from prompts with a diffusion model; the bundled one by default."""
    report = Report(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with report.errors():
        from sampler.cli import batch
        from sampler.cli.source import Source
        from sampler.config import tasks
        from sampler.errors import UsageError
        from sampler.runs.axes import parse_axis

        if context.info_name == "sweep" and not axis:
            raise UsageError("sweep needs --axis NAME=VALUES, such as --axis scale=1..7:2.")
        _stay_offline(offline, download)
        given = {
            **tasks.settings(task, image, mask),
            "--prompts": ("prompts.file", prompts_file),
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
            "--no-dedupe": ("run.dedupe", dedupe),
            "--model": ("model.path", model),
            "--revision": ("model.revision", revision),
            "--device": ("model.device", device),
            "--lora": ("model.lora", lora),
            "--student": ("model.student", student),
            "--dtype": ("model.dtype", dtype),
            "--expand": ("prompts.expand", expand),
            "--wildcards": ("prompts.wildcards", wildcards),
            "--on-bad-row": ("prompts.on_bad_row", on_bad_row),
            "--metadata": ("output.metadata", metadata),
            "--name-template": ("output.name_template", name_template),
            "--strict": ("errors.strict", strict),
            "--max-errors": ("errors.max_errors", max_errors),
        }
        choice("--executor", executor, ("local", "torchrun", "ray"))
        fast = choice("--fingerprint", fingerprint, ("full", "fast")) == "fast"
        settings = _settings(preset, config or [], sets or [], given)
        if prompts and prompts_file is None:
            settings = _without_file(settings)
        axes = [parse_axis(text) for text in axis or []]
        source = Source(settings, prompts or (), axes, fast)
        batch.generate(source, batch.How(executor, address, new, dry_run, download), report)


def choice(option: str, value: str, known: tuple[str, ...]) -> str:
    """The value, if it is one of those known. Raises SamplerError (2)."""
    from sampler import registry
    from sampler.errors import UsageError

    if value not in known:
        raise UsageError(f"{option}: {value!r:.40}{registry.nearest(value, known)}.")
    return value


def _stay_offline(asked: bool, download: bool) -> None:
    """The Hub's client reads the variable when it is imported, which is later."""
    import os

    from sampler.errors import UsageError

    if asked or os.environ.get("SAMPLER_OFFLINE", "").lower() in ("1", "true", "yes"):
        if download:
            raise UsageError("--download needs the network, and --offline forbids it.")
        os.environ["HF_HUB_OFFLINE"] = "1"


def _settings(
    preset: str | None, files: list[Path], sets: list[str], given: dict[str, tuple[str, Any]]
) -> Config:
    import os

    from sampler.config import layers

    lower = [layers.read_file(path) for path in [*layers.preset_files(preset), *files]]
    lower += layers.from_environment(os.environ)
    upper = layers.from_sets(sets), layers.from_options(given)
    settings = layers.resolve(lower, *upper)
    from sampler.bundled import BUNDLED_STUDENT
    from sampler.model_files.student import BUNDLED, student_run

    student = settings.model.student
    if student is None and settings.model.path == BUNDLED_STUDENT:
        student = BUNDLED
    if student is None:
        return settings
    own = layers.Layer(student_run(student), {})
    return layers.resolve([own, *lower], *upper)


def _without_file(settings: Config) -> Config:
    """Prompts of the command line stand in place of those of the configuration."""
    from dataclasses import replace

    return replace(settings, prompts=replace(settings.prompts, file=None, texts=None))


def _number_or_text(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else text
