"""`sampler vote`: vote on the images of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from sampler.cli.options import Debug, Json, Quiet, expanded
from sampler.cli.report import Report, counted


def command(
    run: Annotated[Path, typer.Argument(callback=expanded, help="Run folder of the training.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Vote on the images of a fine-tuning run with the reward `votes`."""
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.core.errors import RunFolderError
        from sampler.rewards.ballots import VOTES, by_prompt, open_ballots, read_ballot, save_votes

        folders = open_ballots(run)
        if not folders:
            raise RunFolderError(f"{run} has no images awaiting votes.")
        folder = folders[0]
        ballot = read_ballot(folder)
        report.note(f"{counted(len(ballot['images']), 'image')} in {folder}")
        votes = [
            vote for _, group in by_prompt(ballot) for vote in _votes(ballot["form"], group, report)
        ]
        save_votes(folder, votes)
        report.event("votes", file=str(folder / VOTES), count=len(votes))
        report.result(str(folder / VOTES))


def _votes(form: str, group: Sequence[dict[str, Any]], report: Report) -> list[dict[str, Any]]:
    """Prompt for the votes on the images of one prompt; an empty answer skips one."""
    report.note(f"{group[0]['prompt']}: " + ", ".join(str(image["file"]) for image in group))
    rows = [int(image["row"]) for image in group]
    if form == "binary":
        answers = [(row, _answer(f"{row}: good? 1 or 0", ("0", "1"))) for row in rows]
        return [{"row": row, "vote": int(answer)} for row, answer in answers if answer]
    if form == "pair":
        found: list[dict[str, Any]] = []
        for a, b in pairwise(rows):
            answer = _answer(f"Which is better, {a} or {b}?", (str(a), str(b)))
            if answer:
                better = int(answer)
                found.append({"better": better, "worse": a + b - better})
        return found
    order = _answer(f"Best first, of {', '.join(map(str, rows))}", tuple(map(str, rows)), many=True)
    return [{"rank": [int(row) for row in order.split()]}] if order else []


def _answer(question: str, allowed: tuple[str, ...], many: bool = False) -> str:
    """Ask until the answer is empty, or made of allowed words: one, or several different ones."""
    while True:
        given = str(typer.prompt(question, default="", show_default=False, err=True)).split()
        right = len(set(given)) == len(given) and set(given) <= set(allowed)
        if not given or (right and (len(given) > 1 if many else len(given) == 1)):
            return " ".join(given)
