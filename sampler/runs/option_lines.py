"""Options inside of prompt lines, as the prompt files of sd-scripts and A1111 have them.

a red fox --n blurry --w 512 --h 768 --s 28 --l 7.5 --d 42           sd-scripts
--prompt "a red fox" --negative_prompt "blurry" --steps 28 --seed -1   A1111
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable

from sampler import registry
from sampler.core.errors import UsageError

# option -> column
OPTIONS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "s": "steps",
    "l": "scale",
    "d": "seed",
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "cfg_scale": "scale",
    "width": "width",
    "height": "height",
    "sampler_name": "sampler",
    "batch_size": "n",
    "n_iter": "n",
}
_COUNTS = ("batch_size", "n_iter")  # their product is the number of images
_START = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


def line_cells(text: str, where: str) -> dict[str, str]:
    """Cells of a line of a text file: its prompt, and the columns that its options set.

    Raises UsageError for an option that is unknown, without a value, or given twice.
    """
    if not _START.search(text):
        return {"prompt": text}
    if text.startswith("--"):
        pairs = _quoted(text, where)
        cells: dict[str, str] = {}
    else:
        prompt, *options = _START.split(text)
        pairs = [option.partition(" ")[::2] for option in options]
        cells = {"prompt": prompt.strip()}
    counts: dict[str, str] = {}
    for option, value in pairs:
        column = _column(option.strip(), where)
        if not value.strip():
            raise UsageError(f"{where}: --{option.strip()} needs a value.")
        taken = counts if option in _COUNTS else cells
        key = option if option in _COUNTS else column
        if key in taken:
            raise UsageError(f"{where}: --{option}: {column} is given twice.")
        taken[key] = value.strip()
    if counts:
        cells["n"] = _product(counts, where)
    return cells


def _quoted(text: str, where: str) -> Iterable[tuple[str, str]]:
    """(option, words up to the next option) of a line of A1111, which quotes as a shell does."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise UsageError(f"{where}: a quote is never closed.") from None
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and word[2:3].isalpha():
            found.append((word[2:], []))
        else:
            found[-1][1].append(word)
    return [(option, " ".join(values)) for option, values in found]


def _column(option: str, where: str) -> str:
    if option in OPTIONS:
        return OPTIONS[option]
    hint = registry.suggestion(option, OPTIONS)
    raise UsageError(
        f"{where}: --{option:.40} is not an option of prompt lines{hint}; a jsonl file takes it as "
        "text."
    )


def _product(counts: dict[str, str], where: str) -> str:
    for option, value in counts.items():
        if not re.fullmatch(r"\d{1,9}", value):
            raise UsageError(f"{where}: --{option} takes an integer, not {value!r:.40}.")
    return str(math.prod(map(int, counts.values())))
