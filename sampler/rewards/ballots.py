"""Folders of images to vote on: RUN/votes/000012/, one of every update of a fine-tuning.

    ballot.json   {"form": "binary", "images": [{"row": 0, "file": "000000.png", "prompt": ...}]}
    000000.png    the image of row 0, and so on
    votes.jsonl   a line per vote; written by `sampler vote`, in one piece

A line is {"row": 3, "vote": 1} (form binary), {"better": 3, "worse": 5} (pair), or
{"rank": [3, 1, 2]}, best first (rank). Rows may be left out.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.core.durable import TEMPORARY, write_file, write_folder
from sampler.core.errors import RunFolderError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

BALLOT, VOTES = "ballot.json", "votes.jsonl"


def write_ballot(folder: Path, form: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Write images [N, 3, H, W] in [0, 1] to be voted on; a folder that is there is kept.

    The images of a resumed run are the same, so their votes count. Raises RunFolderError (4) for a
    folder with other prompts or another form.
    """
    from sampler.core.batch import to_output

    entries = [
        {"row": row, "file": f"{row:06d}.png", "prompt": str(prompt)}
        for row, prompt in enumerate(prompts)
    ]
    ballot = {"form": form, "images": entries}
    if folder.is_dir():
        if read_ballot(folder) != ballot:
            raise RunFolderError(
                f"{folder} has images of other prompts to vote on; choose another folder."
            )
        return
    with write_folder(folder) as new:
        for entry, image in zip(entries, to_output(images.float().cpu(), "pil"), strict=True):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            write_file(new / str(entry["file"]), buffer.getvalue())
        write_file(new / BALLOT, json.dumps(ballot, indent=1).encode())


def read_ballot(folder: Path) -> dict[str, Any]:
    """Return the form and the images of a folder. Raises RunFolderError for an unreadable one."""
    try:
        return json.loads((folder / BALLOT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder / BALLOT} cannot be read: {error}.") from None


def by_prompt(ballot: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The images of a ballot by prompt, in their order."""
    groups = groupby(ballot["images"], key=lambda image: image["prompt"])
    return [(str(prompt), list(images)) for prompt, images in groups]


def open_ballots(run: Path) -> list[Path]:
    """Return the folders of a run, or of its folder of votes, that wait; the oldest first.

    Not those that a writer left unfinished when it was killed.
    """
    place = run / "votes" if (run / "votes").is_dir() else run
    found = sorted(path.parent for path in place.glob(f"*/{BALLOT}"))
    finished = (folder for folder in found if not folder.name.startswith(TEMPORARY))
    return [folder for folder in finished if not (folder / VOTES).exists()]


def save_votes(folder: Path, votes: Sequence[Mapping[str, Any]]) -> None:
    """Write votes.jsonl in one piece, after a check of all lines."""
    text = "".join(json.dumps(vote) + "\n" for vote in votes)
    list(_parsed(text, folder / VOTES, read_ballot(folder)))
    write_file(folder / VOTES, text.encode())


def read_votes(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the votes of a folder. Raises UsageError that names file and line for a wrong one."""
    path = folder / VOTES
    yield from _parsed(path.read_text(encoding="utf-8"), path, read_ballot(folder))


def _parsed(text: str, path: Path, ballot: dict[str, Any]) -> Iterator[dict[str, Any]]:
    count = len(ballot["images"])
    wanted = {
        "binary": '{"row": ..., "vote": number}',
        "pair": '{"better": row, "worse": row}',
        "rank": '{"rank": [rows]}, best first',
    }[ballot["form"]]
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            vote = json.loads(line)
        except ValueError:
            vote = None
        if not isinstance(vote, dict) or not _is_vote(vote, ballot["form"], count):
            raise UsageError(
                f"{path}:{number}: a vote of form {ballot['form']!r} is {wanted}, with different "
                f"rows from 0 to {count - 1}."
            )
        yield vote


def _is_vote(vote: dict[str, Any], form: str, count: int) -> bool:
    """Return True for a line that has exactly the keys and values of its form."""
    if form == "binary":
        value = vote.get("vote")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        rows = [vote.get("row")]
        right = set(vote) == {"row", "vote"} and number and math.isfinite(float(value or 0))
    elif form == "pair":
        rows = [vote.get("better"), vote.get("worse")]
        right = set(vote) == {"better", "worse"}
    else:
        given = vote.get("rank")
        rows = given if isinstance(given, list) else []
        right = set(vote) == {"rank"} and len(rows) > 1
    return (
        right
        and len({*map(str, rows)}) == len(rows)
        and all(
            isinstance(row, int) and not isinstance(row, bool) and 0 <= row < count for row in rows
        )
    )
