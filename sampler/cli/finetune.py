"""`sampler finetune`: a network's adapter, trained for a reward; resumable."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import Debug, Json, Quiet
from sampler.cli.report import Report

if TYPE_CHECKING:
    from sampler.config.schema import ModelConfig
    from sampler.training.recipe import Recipe


def command(
    config: Annotated[
        list[Path] | None, typer.Option("-c", "--config", help="YAML file; later ones win.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Any configuration key.")
    ] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Run folder.")] = None,
    trainer: Annotated[str | None, typer.Option(help="See `sampler list trainers`.")] = None,
    reward: Annotated[str | None, typer.Option(help="See `sampler list rewards`.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="A .txt file, one a line.")
    ] = None,
    updates: Annotated[int | None, typer.Option(help="Batches to learn from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is random.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; default: bundled.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    allow_python: Annotated[
        bool, typer.Option("--allow-python", help="Let --reward be module:function.")
    ] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a model that is not in the local cache.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, try one small update, keep nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model for a reward. The same command goes on with a run that was stopped."""
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.source import check_folder
        from sampler.config.layers import from_environment, from_options, from_sets, read_file
        from sampler.training.recipe import resolve

        given = {
            "--out": ("output.dir", out),
            "--trainer": ("trainer.name", trainer),
            "--reward": ("reward", reward),
            "--prompts": ("prompts", None if prompts is None else {"file": prompts}),
            "--updates": ("fit.updates", updates),
            "--seed": ("fit.seed", seed),
            "--model": ("model.path", model),
            "--device": ("model.device", device),
        }
        layers = [read_file(path) for path in config or []]
        layers += [*from_environment(os.environ), *from_sets(sets or []), *from_options(given)]
        recipe = resolve(layers)
        texts = _texts(recipe)
        check_folder(recipe.output.dir)
        if dry_run:
            _tell_plan(recipe, texts, report)
            _try(recipe, texts, allow_python, download, report)
            return
        _run(recipe, texts, allow_python, download, report)


def _texts(recipe: Recipe) -> list[str]:
    from sampler.errors import UsageError
    from sampler.runs.prompts import check_prompt, read_prompts

    found = [check_prompt(t, f"prompt {i}") for i, t in enumerate(recipe.prompts.texts or (), 1)]
    if recipe.prompts.file is not None:
        found += read_prompts(recipe.prompts.file)
    if not found:
        raise UsageError("No prompts: give --prompts FILE.txt, or prompts in the file.")
    return found


def _tell_plan(recipe: Recipe, texts: list[str], report: Report) -> None:
    from sampler import registry
    from sampler.training.settings import settings_from

    trainer, settings = registry.build("trainer", recipe.trainer), settings_from(recipe.fit)
    steps = settings.steps or trainer.defaults.steps
    facts = {
        "updates": settings.updates,
        "images": settings.updates * settings.batch,
        "steps": steps,
        "prompts": len(texts),
    }
    report.event("plan", trainer=trainer.name, **facts)
    report.result(
        f"{trainer.name}: {facts['updates']} updates of {settings.batch} images, {steps} steps "
        f"each, {len(texts)} prompts, into {recipe.output.dir}"
    )


def _try(
    recipe: Recipe, texts: list[str], allow_python: bool, download: bool, report: Report
) -> None:
    """One small update on the model itself, thrown away."""
    from sampler.training.dry_run import trial

    engine, reward = _loaded(recipe, allow_python, download)
    made = trial(engine, recipe.trainer, reward, texts, recipe.fit)
    report.event("trial", images=made.images, rows=made.rows, seconds=made.seconds)
    report.result(
        f"tried: an update of {made.images} images took {made.seconds:.3g} s; at that rate the "
        f"run takes {made.total / 60:.3g} minutes and its evaluations"
    )


def _loaded(recipe: Recipe, allow_python: bool, download: bool) -> tuple[Any, Any]:
    """The engine, and the reward or None."""
    from sampler.cli.models import load_engine
    from sampler.rewards.python import reward_from

    # the reward is refused before a model is loaded
    reward = None if recipe.reward is None else reward_from(recipe.reward, allow_python)
    return load_engine(_on_own_device(recipe.model), download), reward


def _run(
    recipe: Recipe, texts: list[str], allow_python: bool, download: bool, report: Report
) -> None:
    import sampler
    from sampler.cli.finetune_progress import progress
    from sampler.training.settings import settings_from

    engine, reward = _loaded(recipe, allow_python, download)
    with progress(report, settings_from(recipe.fit).updates) as told:
        done = sampler.finetune(
            engine,
            recipe.trainer,
            reward,
            texts,
            recipe.output.dir,
            settings=recipe.fit,
            progress=told,
        )
    if done.stopped:
        report.note(f"Stopped after {done.updates} updates: {done.stopped}.")
    report.event("summary", updates=done.updates, lora=str(done.lora), stopped=done.stopped)
    report.result(str(done.lora))


def _on_own_device(model: ModelConfig) -> ModelConfig:
    """Under torchrun, each process takes the GPU of its local rank."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    if rank is None or model.device != "auto" or not torch.cuda.is_available():
        return model
    return replace(model, device=f"cuda:{rank}")
