"""`sampler generate` and `sampler sweep`: prompts to a run folder of images, resumable."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sampler.cli.image_options import (
    ControlImages,
    ControlScales,
    ImagePrompts,
    InitImage,
    Inputs,
    MaskImage,
    Strength,
    TaskImage,
    TaskName,
)
from sampler.cli.options import (
    Address,
    Assignments,
    Color,
    ConfigFiles,
    Debug,
    Download,
    Executor,
    Json,
    ModelOptions,
    Quiet,
    Verbose,
    assigned,
    complete_names,
    configuration_option,
    execution_option,
    image_option,
    model_option,
    prompts_option,
    strategy_option,
    takes_model_options,
)
from sampler.cli.report import Report
from sampler.cli.source_options import source_of
from sampler.config.options import (
    Expand,
    ExtraColumns,
    Metadata,
    OnBadRow,
    Preset,
    TableFormat,
)

SWEEP = """Generate images for every combination of the values of one or more --axis options.

NAME is a column of prompt files (steps, seed, guidance), a field of a strategy (guidance.scale), \
or prompt/TEXT, which replaces TEXT in the prompt by each value. VALUES are a,b,c (escape a comma \
as \\,), 1..10, 1..10:2, or 0..1#5 for five evenly spaced values. The last axis varies fastest. \
Without --seed every cell uses seed 0, so that cells differ in the axes only; `sampler grid` draws \
them with labels.

sampler sweep "a fox" --axis guidance=cfg,apg --axis scale=1..7:2
"""


def _seed(text: str | None) -> int | str | None:
    if text is None or text == "random":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r:.40} is not an integer or 'random'.") from None


@takes_model_options()
def command(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts, one per argument.")
    ] = None,
    prompts_file: Annotated[
        str | None,
        prompts_option(
            "--prompts",
            metavar="FILE",
            help="Prompt file: txt, csv, tsv, jsonl or parquet; - reads standard input.",
        ),
    ] = None,
    table_format: Annotated[
        TableFormat | None,
        prompts_option(
            "--format",
            help="Format of the prompt file; default: by its name, or by its first line.",
        ),
    ] = None,
    negative: Annotated[
        str | None, prompts_option("--negative-prompt", "--negative", help="Negative prompt.")
    ] = None,
    expand: Annotated[
        Expand | None, prompts_option(help="Expand {a|b} and __NAME__ in prompts.")
    ] = None,
    wildcards: Annotated[
        str | None, prompts_option(metavar="DIR", help="Folder of NAME.txt files for __NAME__.")
    ] = None,
    on_bad_row: Annotated[
        OnBadRow | None, prompts_option(help="What to do with an invalid prompt line.")
    ] = None,
    extra_columns: Annotated[
        ExtraColumns | None,
        prompts_option(help="Refuse unknown columns, or keep them as meta_NAME."),
    ] = None,
    sampler: Annotated[
        str | None,
        strategy_option(
            help="Sampler name (see `sampler list`).", autocompletion=complete_names("sampler")
        ),
    ] = None,
    guidance: Annotated[
        str | None,
        strategy_option(
            help="Guidance rule name (see `sampler list`).",
            autocompletion=complete_names("guidance"),
        ),
    ] = None,
    scale: Annotated[
        float | None,
        strategy_option("--scale", "--cfg-scale", help="Guidance scale; 1 is no guidance."),
    ] = None,
    steps: Annotated[int | None, strategy_option(help="Sampling steps, 1 to 1000.")] = None,
    axis: Annotated[
        list[str] | None,
        strategy_option(
            "--axis",
            metavar="NAME=VALUES",
            help="Sweep an axis: a,b,c or 1..10:2 or 0..1#5; repeatable.",
        ),
    ] = None,
    n: Annotated[int | None, image_option("-n", help="Images per prompt.")] = None,
    seed: Annotated[
        str | None,
        image_option(
            metavar="N|random",
            callback=_seed,
            help="Image i of every prompt has seed N + i; default: derived from the prompt.",
        ),
    ] = None,
    width: Annotated[int | None, image_option(help="Width in pixels.")] = None,
    height: Annotated[int | None, image_option(help="Height in pixels.")] = None,
    task: TaskName = None,
    image: TaskImage = None,
    mask: MaskImage = None,
    init_image: InitImage = None,
    strength: Strength = None,
    control_image: ControlImages = None,
    control_scale: ControlScales = None,
    ip_image: ImagePrompts = None,
    inputs: Inputs = None,
    dedupe: Annotated[
        bool | None, image_option("--dedupe/--no-dedupe", help="Generate identical jobs once.")
    ] = None,
    best_of: Annotated[
        int | None,
        image_option(min=1, help="Draft N images per prompt, and run the best -n of them in full."),
    ] = None,
    reward: Annotated[
        str | None,
        image_option(metavar="NAME[:OPTION=VALUE]", help="Reward that chooses for --best-of."),
    ] = None,
    draft: Annotated[
        list[str] | None,
        image_option(metavar="COLUMN=VALUE", help="Setting of the drafts only; repeatable."),
    ] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Run folder or its URL.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Always create a new run folder.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add the images that the run folder -o does not have.")
    ] = False,
    metadata: Annotated[
        Metadata | None, typer.Option(help="Metadata to embed in the images.")
    ] = None,
    name_template: Annotated[
        str | None,
        typer.Option(
            help="File names from {index} {key} {seed} {slug} {sampler} {guidance} {axis:NAME}."
        ),
    ] = None,
    *,
    model: ModelOptions,
    download: Download = False,
    offline: Annotated[bool, model_option("--offline", help="Never access the network.")] = False,
    fingerprint: Annotated[
        Literal["full", "fast"],
        model_option(help="Hash whole model files, or a sample of each."),
    ] = "full",
    config: ConfigFiles = None,
    preset: Annotated[
        Preset | None, configuration_option(help="Preset of settings; -c overrides it.")
    ] = None,
    sets: Assignments = None,
    batch_size: Annotated[
        str | None,
        execution_option(
            metavar="N|auto",
            callback=lambda text: int(text) if text and text.isdecimal() else text,
            help="Images per batch.",
        ),
    ] = None,
    executor: Executor = "local",
    address: Address = None,
    strict: Annotated[
        bool | None, execution_option("--strict", help="Stop at the first failure.")
    ] = None,
    max_errors: Annotated[
        int | None, execution_option(metavar="N", help="Abort after more than N failures.")
    ] = None,
    dry_run: Annotated[
        bool, execution_option("--dry-run", help="Print the plan without loading the model.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    color: Color = "auto",
) -> None:
    """Generate images from prompts; without --model, with the small bundled model."""
    report = Report(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with report.errors():
        from sampler.cli import batch
        from sampler.config.options import GENERATE
        from sampler.core.errors import UsageError

        if context.info_name == "sweep" and not axis:
            raise UsageError("sweep needs --axis NAME=VALUES, such as --axis scale=1..7:2.")
        source = source_of(
            assigned(context, GENERATE), prompts, prompts_file, axis,
            task=task, image=image, mask=mask, init_image=init_image, strength=strength,
            control_image=control_image, control_scale=control_scale, ip_image=ip_image,
            inputs=inputs, model=model, download=download, offline=offline,
            fingerprint=fingerprint, config=config, preset=preset, sets=sets, scale=scale,
        )  # fmt: skip
        run = batch.RunOptions(executor, address, new, dry_run, download, extend=extend)
        if best_of is None:
            if reward is not None or draft:
                raise UsageError("--reward and --draft belong to --best-of N.")
            batch.generate(source, run, report)
            return
        from sampler.cli.best_of import BestOfOptions, generate_best

        generate_best(source, BestOfOptions(best_of, reward, draft or ()), run, report)
