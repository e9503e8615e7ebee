"""`sampler validate` and `sampler config schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sampler.cli.options import Debug, Json
from sampler.cli.report import Report

MAX_PROBLEMS = 20  # printed per file


def validate(
    files: Annotated[
        list[Path], typer.Argument(help="Configurations (yaml, toml, json) and prompt files.")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check configuration and prompt files; exit code 2 if one is invalid."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.config.formats import KINDS

        invalid = 0
        for path in files:
            found, problems = _config(path) if path.suffix.lower() in KINDS else _prompts(path)
            invalid += bool(problems)
            report.event("file", file=str(path), ok=not problems, found=found, problems=problems)
            if not problems:
                report.result(f"{path}: ok, {found}")
            for problem in problems[:MAX_PROBLEMS]:
                report.note(f"sampler: {problem}")
            if len(problems) > MAX_PROBLEMS:
                report.note(f"sampler: {path}: {len(problems) - MAX_PROBLEMS} more problems.")
        if invalid:
            raise typer.Exit(2)


def _config(path: Path) -> tuple[str, list[str]]:
    """Check a configuration of `generate`, or of `finetune` if it has one of its sections."""
    from sampler.config import layers
    from sampler.config.options import FINETUNE_SECTIONS
    from sampler.core.errors import SamplerError

    try:
        layer = layers.read_file(path)
        if FINETUNE_SECTIONS & set(layer.tree):
            from sampler.training import recipe

            recipe.resolve_recipe([layer])
            return "a fine-tuning configuration", []
        layers.resolve([layer], [], [])
    except SamplerError as error:
        return "", [str(error)]
    return "a configuration", []


def _prompts(path: Path) -> tuple[str, list[str]]:
    """Plan every line as for a run of the bundled model and collect all problems."""
    from sampler.config.schema import Config, PromptsConfig
    from sampler.core.errors import SamplerError
    from sampler.runs.source import Source

    prompts = PromptsConfig(file=str(path), on_bad_row="skip")
    source = Source(Config(prompts=prompts))
    try:
        plan = source.plan(source.model()).plan
    except SamplerError as error:
        return "", [*source.skipped, str(error)]
    return f"{plan.lines} lines, {plan.jobs} images", source.skipped


def schema(debug: Debug = False) -> None:
    """Print the JSON schema of configuration files."""
    report = Report(debug=debug)
    with report.errors():
        from sampler.config.schema import schema as config_schema

        print(json.dumps(config_schema(), indent=2))


config = typer.Typer(help="Configuration files.", no_args_is_help=True)
config.command()(schema)
config.callback()(lambda: None)
