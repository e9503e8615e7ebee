"""`sampler generate --best-of N`: drafts of N images a prompt, full runs of the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sampler.cli import batch
from sampler.cli.report import Report
from sampler.core.errors import UsageError
from sampler.evaluation import best_of
from sampler.runs.source import Source
from sampler.workers.best_of import DRAFTS


@dataclass(frozen=True)
class BestOfOptions:
    """Options of the command. drafts: COLUMN=VALUE of prompt files, for the drafts only."""

    count: int
    reward: str | None
    drafts: Sequence[str]


def generate_best(
    source: Source, given: BestOfOptions, options: batch.RunOptions, report: Report
) -> None:
    """Generate drafts into OUT/drafts, choose, and run the chosen ones in full into OUT.

    Both are run folders: the same command resumes whichever was stopped. Raises SamplerError.
    """
    where = source.config.output.dir
    if where is None or options.new or options.extend or options.dry_run:
        raise UsageError("--best-of needs the run folder -o DIR, no --new, --extend or --dry-run.")
    if options.executor != "local" or source.axes:
        raise UsageError("--best-of runs in one process and without --axis.")
    if given.reward is None:
        raise UsageError("--best-of needs --reward NAME, which chooses among the drafts.")
    best = best_of.BestOf(given.count, given.reward, draft_columns(given.drafts))
    source, folder = replace(source, lines=[*source.read_lines()]), f"{where}/{DRAFTS}"
    batch.generate(best_of.drafts_of(source, best, folder), options, replace(report, results=False))
    choices = best_of.choices_of(source, best, folder)
    batch.generate(best_of.finals_of(source, best, choices), options, report)
    records = best_of.records_of(source, where, best, choices)
    held = sum(bool(record["order_held"]) for record in records)
    report.note(
        f"The drafts' order held for {held} of {len(records)} prompts ({where}/{best_of.FILE})."
    )


def draft_columns(texts: Sequence[str]) -> dict[str, str]:
    """Columns of the drafts. Raises UsageError for a text that is not COLUMN=VALUE."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in ("prompt", "seed", "n"):
            raise UsageError(f"--draft takes COLUMN=VALUE, such as steps=4, not {text!r:.60}.")
        found[name] = value
    return found
