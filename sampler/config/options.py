"""Choices of settings, and the command-line options that set a configuration key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

TableFormat = Literal["txt", "csv", "tsv", "jsonl", "parquet"]
Expand = Literal["none", "random", "all"]
OnBadRow = Literal["error", "skip"]
ExtraColumns = Literal["error", "keep"]
Metadata = Literal["full", "basic", "none"]
VideoFormat = Literal["webp", "mp4"]
ImageFormat = Literal["png", "jpeg", "webp"]
Task = Literal["inpaint", "superres", "deblur", "denoise", "hdr", "jpeg"]
Preset = Literal["apg_paper", "classic", "draft"]

# option -> key of `sampler.config.schema.Config`; those of a model: `sampler.config.model`
GENERATE: Mapping[str, str] = {
    "--prompts": "prompts.file",
    "--format": "prompts.format",
    "--expand": "prompts.expand",
    "--wildcards": "prompts.wildcards",
    "--on-bad-row": "prompts.on_bad_row",
    "--extra-columns": "prompts.extra_columns",
    "--negative-prompt": "run.negative_prompt",
    "-n": "run.n",
    "--seed": "run.seed",
    "--steps": "run.steps",
    "--width": "run.width",
    "--height": "run.height",
    "--batch-size": "run.batch_size",
    "--dedupe": "run.dedupe",
    "--sampler": "sampler",
    "--guidance": "guidance",
    "--out": "output.dir",
    "--metadata": "output.metadata",
    "--name-template": "output.name_template",
    "--strict": "errors.strict",
    "--max-errors": "errors.max_errors",
}
# Sections of `sampler.training.recipe.Recipe` that a configuration of `generate` does not have.
FINETUNE_SECTIONS = frozenset({"trainer", "reward", "fit"})
# option -> key of `sampler.training.recipe.Recipe`
FINETUNE: Mapping[str, str] = {
    "--out": "output.dir",
    "--trainer": "trainer.name",
    "--reward": "reward",
    "--prompts": "prompts.file",
    "--data": "trainer.data",
    "--updates": "fit.updates",
    "--seed": "fit.seed",
}
