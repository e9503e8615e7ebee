"""`sampler finetune`: train a LoRA or a student for a reward; resumable."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import (
    Assignments,
    ConfigFiles,
    Debug,
    Download,
    Json,
    ModelOptions,
    Quiet,
    assigned,
    complete_names,
    model_settings,
    takes_model_options,
)
from sampler.cli.report import Report

if TYPE_CHECKING:
    from sampler.config.model import ModelConfig
    from sampler.training.recipe import Recipe


@takes_model_options(leave_out=("drop_encoders",))
def command(
    context: typer.Context,
    config: ConfigFiles = None,
    sets: Assignments = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Run folder.")] = None,
    trainer: Annotated[
        str | None,
        typer.Option(
            help="Trainer name (see `sampler list`).", autocompletion=complete_names("trainer")
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Reward name (see `sampler list`).", autocompletion=complete_names("reward")
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="Prompt file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="PATH", help="Training images, the field data of the trainer."
        ),
    ] = None,
    updates: Annotated[int | None, typer.Option(help="Training updates; default: 20.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed; default: 0.")] = None,
    *,
    model: ModelOptions,
    allow_python: Annotated[
        bool, typer.Option("--allow-python", help="Allow a reward given as module:function.")
    ] = False,
    download: Download = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration and time one small update.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model for a reward; the same command resumes a stopped run."""
    muted = os.environ.get("RANK", "0") != "0"
    report = Report(as_json=as_json, quiet=quiet, debug=debug, muted=muted)
    with report.errors():
        from sampler.config.layers import from_environment, from_options, from_sets, read_file
        from sampler.config.options import FINETUNE
        from sampler.runs.location import check_writable
        from sampler.training.recipe import resolve_recipe

        layers = [read_file(path) for path in config or []]
        layers += [*from_environment(os.environ), *from_sets(sets or [])]
        options = {**assigned(context, FINETUNE), **model_settings(model)}
        recipe = resolve_recipe([*layers, *from_options(options)])
        texts = _texts(recipe)
        check_writable(recipe.output.dir)
        if dry_run:
            _print_plan(recipe, texts, report)
            _dry_run(recipe, texts, allow_python, download, report)
            return
        _run(recipe, texts, allow_python, download, report)


def _texts(recipe: Recipe) -> list[str]:
    """The prompts of a configuration, after a check that there are some to train on."""
    from sampler import registry
    from sampler.training.prompts import read_prompts

    given = [recipe.prompts.texts, recipe.prompts.file]
    found = [text for prompts in given if prompts for text in read_prompts(prompts)]
    registry.build("trainer", recipe.trainer).texts(found)
    return found


def _print_plan(recipe: Recipe, texts: list[str], report: Report) -> None:
    from sampler import registry
    from sampler.training.settings import settings_from

    trainer, settings = registry.build("trainer", recipe.trainer), settings_from(recipe.fit)
    steps = settings.steps or trainer.defaults.steps
    images = settings.batch_of(trainer.images_per_prompt)
    facts = {
        "updates": settings.updates,
        "images": settings.updates * images,
        "steps": steps,
        "prompts": len(trainer.texts(texts)),
    }
    report.event("plan", trainer=trainer.name, **facts)
    report.result(
        f"{trainer.name}: {facts['updates']} updates of {images} images, {steps} steps "
        f"each, {facts['prompts']} prompts, into {recipe.output.dir}"
    )


def _dry_run(
    recipe: Recipe, texts: list[str], allow_python: bool, download: bool, report: Report
) -> None:
    """Time one small update on the model and discard it."""
    from sampler.training.dry_run import dry_run

    engine, reward = _loaded(recipe, allow_python, download)
    done = dry_run(engine, recipe.trainer, reward, texts, recipe.fit, allow_python=allow_python)
    report.event("dry_run", images=done.images, nfe=done.nfe, seconds=done.seconds)
    report.result(
        f"Dry run: an update of {done.images} images took {done.seconds:.3g} s; at that rate the "
        f"run takes {done.total / 60:.3g} minutes, plus its evaluations"
    )


def _loaded(recipe: Recipe, allow_python: bool, download: bool) -> tuple[Any, Any]:
    """The engine, and the reward or None; a wrong reward is refused before the model is loaded."""
    from sampler.cli.models import load_engine
    from sampler.rewards.python import reward_from

    reward = None if recipe.reward is None else reward_from(recipe.reward, allow_python)
    return load_engine(_on_rank_device(recipe.model), download), reward


def _run(
    recipe: Recipe, texts: list[str], allow_python: bool, download: bool, report: Report
) -> None:
    import sampler
    from sampler.training.settings import settings_from

    engine, reward = _loaded(recipe, allow_python, download)
    with report.updates(settings_from(recipe.fit).updates) as show:
        done = sampler.finetune(
            engine,
            recipe.trainer,
            reward,
            texts,
            recipe.output.dir,
            settings=recipe.fit,
            allow_python=allow_python,
            progress=show,
        )
    if done.stopped:
        report.note(f"Stopped after {done.updates} updates: {done.stopped}.")
    report.event("summary", updates=done.updates, lora=str(done.lora), stopped=done.stopped)
    report.result(str(done.lora))


def _on_rank_device(model: ModelConfig) -> ModelConfig:
    """The model on the GPU of the local rank under torchrun."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    if rank is None or model.device != "auto" or not torch.cuda.is_available():
        return model
    return replace(model, device=f"cuda:{rank}")
