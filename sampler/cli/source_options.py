"""Options of `generate` as the source of a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.cli.options import (
    Assignments,
    ConfigFiles,
    ModelOptions,
    assigned_inputs,
    model_settings,
)
from sampler.config.options import Preset, Task

if TYPE_CHECKING:
    from sampler.config.schema import Config
    from sampler.runs.source import Source


def source_of(
    assigned_keys: dict[str, tuple[str, Any]],
    prompts: list[str] | None,
    prompts_file: str | None,
    axis: list[str] | None,
    *,
    inputs: list[str] | None,
    model: ModelOptions,
    download: bool,
    offline: bool,
    fingerprint: str,
    config: ConfigFiles,
    preset: Preset | None,
    sets: Assignments,
    scale: float | None,
    task: Task | None = None,
    image: str | None = None,
    mask: str | None = None,
    init_image: str | None = None,
    strength: float | None = None,
    control_image: list[str] | None = None,
    control_scale: list[float] | None = None,
    ip_image: list[str] | None = None,
) -> Source:
    """Inputs of the plan of a command line with the options of `generate`. Raises UsageError.

    assigned_keys: options that set a configuration key, as `assigned` returns them.
    """
    from sampler.config import tasks
    from sampler.runs.axes import parse_axis
    from sampler.runs.source import Source

    _forbid_network(offline, download)
    start, defaults = tasks.start_settings(init_image, mask, strength, task or image)
    start |= tasks.adapter_settings(control_image, control_scale, ip_image)
    restored = {} if init_image is not None else tasks.restore_settings(task, image, mask)
    options = {
        **start,
        **restored,
        **assigned_keys,
        **model_settings(model),
    }
    options |= assigned_inputs(inputs or [], start)
    settings = settings_from_layers(preset, config or [], sets or [], options, defaults)
    if prompts and prompts_file is None:
        settings = replace(settings, prompts=replace(settings.prompts, file=None, texts=None))
    axes = [parse_axis(text) for text in axis or []]
    return Source(settings, prompts or (), axes, fingerprint == "fast", scale=scale)


def _forbid_network(offline: bool, download: bool) -> None:
    """Set the variable that the Hub's client reads when it is imported, which is later."""
    import os

    from sampler.core.errors import UsageError

    if offline or os.environ.get("SAMPLER_OFFLINE", "").lower() in ("1", "true", "yes"):
        if download:
            raise UsageError("--download needs the network, and --offline forbids it.")
        os.environ["HF_HUB_OFFLINE"] = "1"


def settings_from_layers(
    preset: Preset | None,
    files: list[Path],
    sets: list[str],
    options: dict[str, tuple[str, Any]],
    defaults: dict[str, Any],
) -> Config:
    """Merge all layers; defaults and the settings that a student was trained for are below them."""
    import os

    from sampler.bundled import BUNDLED_STUDENT
    from sampler.config import layers
    from sampler.models.student_files import BUNDLED, student_run

    lower = [layers.Layer(defaults, {})]
    lower += [layers.read_file(path) for path in [*layers.preset_files(preset), *files]]
    lower += layers.from_environment(os.environ)
    upper = layers.from_sets(sets), layers.from_options(options)
    settings = layers.resolve(lower, *upper)
    student = settings.model.student
    if student is None and settings.model.path == BUNDLED_STUDENT:
        student = BUNDLED
    if student is None:
        return settings
    return layers.resolve([layers.Layer(student_run(student), {}), *lower], *upper)
