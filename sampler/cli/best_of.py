"""`sampler generate --best-of N`: drafts of N images a prompt, full runs of the best ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sampler.cli import batch
from sampler.cli.report import Report
from sampler.core.durable import write_file
from sampler.core.errors import IncompleteError, SamplerError, UsageError
from sampler.core.images import read
from sampler.evaluation.parse import scorers_from
from sampler.evaluation.pictures import open_pictures
from sampler.evaluation.scorers import RewardScorer
from sampler.runs.cells import scalar
from sampler.runs.folder import RunFolder
from sampler.runs.readers import RawLine
from sampler.runs.source import Source
from sampler.runs.store import open_store
from sampler.workers.best_of import DRAFTS, META, Choice, choose, default_steps, scores_of

if TYPE_CHECKING:
    from sampler.rewards.base import RewardBase

FILE = "best_of.json"


@dataclass(frozen=True)
class BestOf:
    """Options of the command. drafts: COLUMN=VALUE of prompt files, for the drafts only."""

    count: int
    reward: str | None
    drafts: Sequence[str]
    allow_python: bool = False


def generate_best(source: Source, best: BestOf, options: batch.RunOptions, report: Report) -> None:
    """Generate drafts into OUT/drafts, choose, and run the chosen ones in full into OUT.

    Both are run folders: the same command resumes whichever was stopped. Raises SamplerError.
    """
    config, where = source.config, source.config.output.dir
    if where is None or options.new or options.extend or options.dry_run:
        raise UsageError("--best-of needs the run folder -o DIR, no --new, --extend or --dry-run.")
    if options.executor != "local" or source.axes:
        raise UsageError("--best-of runs in one process and without --axis.")
    if best.reward is None:
        raise UsageError("--best-of needs --reward NAME, which chooses among the drafts.")
    reward, given = reward_of(best.reward), draft_columns(best.drafts)
    lines = [*source.read_lines()]
    counts = [_count(line, config.run.n, best.count) for line in lines]
    reward.check()
    folder, quiet = f"{where}/{DRAFTS}", replace(report, results=False)
    output = replace(config.output, dir=folder, name_template=None)
    drafts = replace(
        source,
        config=replace(config, output=output),
        lines=[_draft(line, best.count, given, config.run.steps) for line in lines],
    )
    batch.generate(drafts, options, quiet)
    choices = _choices(folder, reward, counts)
    prompts = replace(config.prompts, expand="none")
    finals = replace(
        source,
        config=replace(config, prompts=prompts),
        lines=[
            _final(lines[k], choice, rank, reward)
            for k, choice in choices
            for rank in range(len(choice.chosen))
        ],
    )
    batch.generate(finals, options, report)
    records = _records(where, [choice for _, choice in choices], reward)
    write_file(Path(where).expanduser() / FILE, _dump(records))
    held = sum(bool(record["order_held"]) for record in records)
    report.note(f"The drafts' order held for {held} of {len(records)} prompts ({where}/{FILE}).")


def reward_of(text: str) -> RewardBase:
    """Reward of NAME[:OPTION=VALUE]. Raises UsageError for other scorers."""
    (scorer,) = scorers_from([text])
    if not isinstance(scorer, RewardScorer):
        raise UsageError(f"--reward: {text!r:.60} is a scorer of evaluations and no reward.")
    return scorer.reward


def draft_columns(texts: Sequence[str]) -> dict[str, str]:
    """Columns of the drafts. Raises UsageError for a text that is not COLUMN=VALUE."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in ("prompt", "seed", "n"):
            raise UsageError(f"--draft takes COLUMN=VALUE, such as steps=4, not {text!r:.60}.")
        found[name] = value
    return found


def _cells(line: RawLine) -> dict[str, Any]:
    if isinstance(line.cells, SamplerError):
        raise line.cells
    return dict(line.cells)


def _count(line: RawLine, default: int, candidates: int) -> int:
    """Number of images of a line. Raises UsageError for more than there are candidates."""
    given = _cells(line).get("n")
    try:
        count = int(default if given in (None, "") else given)
    except ValueError:
        return default  # the check of the drafts' lines names the cell
    if count > candidates:
        raise UsageError(f"{line.where}: n = {count} is more than --best-of {candidates}.")
    return count


def _draft(line: RawLine, count: int, given: dict[str, str], steps: int) -> RawLine:
    """Line of the drafts of a line."""
    cells = _cells(line)
    own = {name: value if line.text else scalar(value) for name, value in given.items()}
    if "steps" not in own:
        try:
            own["steps"] = default_steps(int(cells.get("steps") or steps))
        except ValueError:
            own["steps"] = cells["steps"]
    return line._replace(cells={**cells, **own, "n": count})


def _choices(folder: str, reward: RewardBase, counts: Sequence[int]) -> list[tuple[int, Choice]]:
    """(line, choice) of every prompt of the drafts. Raises IncompleteError for failed drafts."""
    run = RunFolder(open_store(folder))
    pictures = {p.name: p for p in open_pictures(folder).pictures}
    entries, groups = run.results().entries, {}
    for job in run.jobs():
        entry = entries.get(job.key, {})
        if entry.get("status") != "ok" or entry["file"] not in pictures:
            raise IncompleteError(f"{folder}: a draft of {job.prompt!r:.60} failed.")
        groups.setdefault((job.line, job.prompt), []).append((job, entry))
    found = []
    for (line, prompt), members in groups.items():
        images = torch.cat([read(pictures[entry["file"]].read()) for _, entry in members])
        scores = scores_of(reward, images, [prompt] * len(members))
        seeds = [job.seed for job, _ in members]
        nfe = [entry["nfe"] for _, entry in members]
        found.append((line, choose(prompt, seeds, scores, nfe, counts[line])))
    return found


def _final(line: RawLine, choice: Choice, rank: int, reward: RewardBase) -> RawLine:
    """Line of one chosen image."""
    meta = {"rank": rank, **choice.meta(), "reward": reward.name}
    seed = choice.seeds[choice.chosen[rank]]
    own = {"prompt": choice.prompt, "n": 1, "seed": seed, f"meta_{META}": meta}
    return line._replace(cells={**_cells(line), **own})


def _records(where: str, choices: Sequence[Choice], reward: RewardBase) -> list[dict[str, Any]]:
    """Records of the choices with the scores of the full runs."""
    made = {(p.prompt, p.seed): p for p in open_pictures(where).pictures}
    records = []
    for choice in choices:
        chosen = [made[choice.prompt, choice.seeds[k]] for k in choice.chosen]
        images = torch.cat([read(picture.read()) for picture in chosen])
        scores = scores_of(reward, images, [choice.prompt] * len(chosen))
        nfe = sum(picture.nfe or 0 for picture in chosen)
        records.append(replace(choice, final_scores=tuple(scores), final_nfe=nfe).plain())
    return records


def _dump(records: Sequence[Any]) -> bytes:
    return (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode()
