"""`sampler validate` and `sampler config schema`: are these files what they should be?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sampler.cli.options import Debug, Json
from sampler.cli.report import Report

MOST = 20  # problems told of one file


def validate(
    files: Annotated[
        list[Path], typer.Argument(help="Configurations (yaml, toml, json) and prompt files.")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check configuration and prompt files; exit code 2 if one is wrong."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler.config.formats import KINDS

        wrong = 0
        for path in files:
            found, problems = _config(path) if path.suffix.lower() in KINDS else _prompts(path)
            wrong += bool(problems)
            report.event("file", file=str(path), ok=not problems, found=found, problems=problems)
            if not problems:
                report.result(f"{path}: ok, {found}")
            for problem in problems[:MOST]:
                report.note(f"sampler: {problem}")
            if len(problems) > MOST:
                report.note(f"sampler: {path}: {len(problems) - MOST} more problems.")
        if wrong:
            raise typer.Exit(2)


def _config(path: Path) -> tuple[str, list[str]]:
    from sampler.config import layers
    from sampler.errors import SamplerError

    try:
        layers.resolve([layers.read_file(path)], [], [])
    except SamplerError as error:
        return "", [str(error)]
    return "a configuration", []


def _prompts(path: Path) -> tuple[str, list[str]]:
    """Every row planned as for a run of the bundled model; all problems at once."""
    from sampler.cli.source import Source
    from sampler.config.schema import Config, PromptsConfig
    from sampler.errors import SamplerError

    prompts = PromptsConfig(file=str(path), on_bad_row="skip")
    source = Source(Config(prompts=prompts))
    try:
        planner = source.planner(source.model())
        for _ in planner.jobs(source.rows(), source.is_text):
            pass
    except SamplerError as error:
        return "", [*source.skipped, str(error)]
    plan = planner.plan
    return f"{plan.rows} rows, {plan.jobs} images", source.skipped


def schema(debug: Debug = False) -> None:
    """Print the JSON schema of configuration files, for editors."""
    report = Report(debug=debug)
    with report.errors():
        from sampler.config.schema import schema as config_schema

        print(json.dumps(config_schema(), indent=2))
