"""Best of N in run folders: plans of the drafts and of the full runs, and the choice between.

    drafts_of(source) -> run -> choices_of(its folder) -> finals_of(source) -> run -> records_of

Both runs are folders like any other, OUT/drafts and OUT, so both resume and verify.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sampler.config.schema import Limits
from sampler.core.durable import write_file
from sampler.core.errors import IncompleteError, SamplerError, UsageError
from sampler.core.images import read
from sampler.evaluation.parse import scorers_from
from sampler.evaluation.pictures import Picture, open_pictures
from sampler.evaluation.scorers import RewardScorer
from sampler.rewards.base import Prompt, RewardBase
from sampler.runs.cells import scalar
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import Job
from sampler.runs.lines import META as LABEL
from sampler.runs.lines import parse_line
from sampler.runs.readers import RawLine
from sampler.runs.source import Source
from sampler.runs.store import open_store
from sampler.workers.best_of import META, DraftChoice, choose, default_steps, scores_of

FILE = "best_of.json"
Choices = Sequence[tuple[int, DraftChoice]]  # with the number of the line


@dataclass(frozen=True)
class BestOf:
    """Number of candidates per prompt, the reward that chooses, columns of the drafts only.

    text: that of the reward, NAME[:OPTION=VALUE].
    """

    count: int
    text: str
    drafts: Mapping[str, Any]

    @cached_property
    def reward(self) -> RewardBase:
        """The reward, built once. Raises UsageError for other scorers."""
        (scorer,) = scorers_from([self.text])
        if not isinstance(scorer, RewardScorer):
            raise UsageError(
                f"--reward: {self.text!r:.60} is a scorer for evaluations, not a reward."
            )
        return scorer.reward


def drafts_of(source: Source, best: BestOf, folder: str) -> Source:
    """The plan of the drafts of all candidates into `folder`; source: with its lines.

    Raises UsageError for more images than candidates.
    """
    config = source.config
    for line in source.lines or ():
        _check_count(line, config.run.n, best.count)
    best.reward.check()
    output = replace(config.output, dir=folder, name_template=None)
    lines = [_draft(line, best, config.run.steps) for line in source.lines or ()]
    return replace(source, config=replace(config, output=output), lines=lines)


def choices_of(source: Source, best: BestOf, folder: str) -> Choices:
    """The choice for every prompt of the drafts. Raises IncompleteError for failed drafts."""
    counts = [_check_count(line, source.config.run.n, best.count) for line in source.lines or ()]
    found = []
    for (line, prompt), members in _by_line(folder).items():
        scores = _scores(best.reward, members, source, line)
        seeds = [job.seed for job, _ in members]
        nfe = [picture.nfe or 0 for _, picture in members]
        found.append((line, choose(prompt, seeds, scores, nfe, counts[line])))
    return found


def _by_line(folder: str) -> dict[tuple[int, str], list[tuple[Job, Picture]]]:
    """Images of a run by the number and the prompt of their line, those of equal lines too.

    Raises IncompleteError for an image that failed.
    """
    run = RunFolder(open_store(folder))
    pictures = {p.name: p for p in open_pictures(folder).pictures}
    jobs, entries = [*run.jobs()], run.results().entries
    found: dict[tuple[int, str], list[tuple[Job, Picture]]] = {}
    equal = [(line, jobs[number]) for line, number in run.duplicates]
    for line, job in sorted([*((job.line, job) for job in jobs), *equal], key=lambda one: one[0]):
        entry = entries.get(job.key, {})
        if entry.get("status") != "ok" or entry["file"] not in pictures:
            raise IncompleteError(f"{folder}: an image of {job.prompt!r:.60} failed.")
        found.setdefault((line, job.prompt), []).append((job, pictures[entry["file"]]))
    return found


def _scores(
    reward: RewardBase, members: Sequence[tuple[Job, Picture]], source: Source, line: int
) -> list[float]:
    """Scores of the images of a line; the reward is told its metadata."""
    images = torch.cat([read(p.read(), p.name, on_white=True) for _, p in members])
    meta = parse_line((source.lines or ())[line], Limits(), extra=set()).meta
    metadata = {key.removeprefix(LABEL): value for key, value in meta.items()}
    return scores_of(reward, images, [Prompt(job.prompt, metadata) for job, _ in members])


def finals_of(source: Source, best: BestOf, choices: Choices) -> Source:
    """The plan of the full runs of the chosen candidates."""
    lines = [*(source.lines or ())]
    prompts = replace(source.config.prompts, expand="none")
    chosen = [
        _final(lines[k], choice, rank, best.reward)
        for k, choice in choices
        for rank in range(len(choice.chosen))
    ]
    return replace(source, config=replace(source.config, prompts=prompts), lines=chosen)


def records_of(source: Source, where: str, best: BestOf, choices: Choices) -> list[dict[str, Any]]:
    """Records of the choices with the scores of the full runs; they are written to best_of.json."""
    records: list[dict[str, Any]] = []
    made = iter(_by_line(where).values())  # a line per image, in the order of the choices
    for line, choice in choices:
        finals = [next(made)[0] for _ in choice.chosen]
        scores = _scores(best.reward, finals, source, line)
        nfe = sum(picture.nfe or 0 for _, picture in finals)
        records.append(replace(choice, final_scores=tuple(scores), final_nfe=nfe).plain())
    text = json.dumps(records, indent=1, ensure_ascii=False)
    write_file(Path(where).expanduser() / FILE, f"{text}\n".encode())
    return records


def _cells(line: RawLine) -> dict[str, Any]:
    if isinstance(line.cells, SamplerError):
        raise line.cells
    return dict(line.cells)


def _check_count(line: RawLine, default: int, candidates: int) -> int:
    """Number of images of a line. Raises UsageError for more than there are candidates."""
    given = _cells(line).get("n")
    try:
        count = int(default if given in (None, "") else given)
    except ValueError:
        return default  # the check of the drafts' lines names the cell
    if count > candidates:
        raise UsageError(f"{line.where}: n = {count} is more than --best-of {candidates}.")
    return count


def _draft(line: RawLine, best: BestOf, steps: int) -> RawLine:
    """Line of the drafts of a line."""
    cells = _cells(line)
    own = {
        name: scalar(value) if isinstance(value, str) and not line.text else value
        for name, value in best.drafts.items()
    }
    if "steps" not in own:
        try:
            own["steps"] = default_steps(int(cells.get("steps") or steps))
        except ValueError:
            own["steps"] = cells["steps"]
    return line._replace(cells={**cells, **own, "n": best.count})


def _final(line: RawLine, choice: DraftChoice, rank: int, reward: RewardBase) -> RawLine:
    """Line of one chosen image."""
    meta = {"rank": rank, **choice.meta(), "reward": reward.name}
    seed = choice.seeds[choice.chosen[rank]]
    own = {"prompt": choice.prompt, "n": 1, "seed": seed, f"meta_{META}": meta}
    return line._replace(cells={**_cells(line), **own})
