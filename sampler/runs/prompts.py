"""Prompt files: UTF-8 text with one prompt per line; blank lines and lines with # are skipped."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from sampler.types import SamplerError

MAX_CHARS = 20_000
MAX_LINE = 2**20  # bytes


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a .txt file, or of standard input for "-".

    Raises SamplerError (2) that names the file and the line: a file that is missing, of another
    kind, not UTF-8, holds control characters or over-long lines, or has no prompt at all.
    """
    if str(path) == "-":
        return _prompts(sys.stdin.buffer, "standard input")
    path = Path(path)
    if path.suffix.lower() != ".txt":
        raise SamplerError(f"{path}: prompt files are .txt files with one prompt per line.", 2)
    try:
        with path.open("rb") as stream:
            return _prompts(stream, str(path))
    except OSError as error:
        reason = (error.strerror or "it cannot be read").lower()
        raise SamplerError(f"{path}: {reason}.", 2) from None


def check_prompt(text: str, where: str) -> str:
    """The prompt as it is. Raises SamplerError (2) for control characters and beyond MAX_CHARS."""
    if len(text) > MAX_CHARS:
        raise SamplerError(f"{where}: the prompt has more than {MAX_CHARS} characters.", 2)
    for letter in text:
        # Cc: control characters; Cs: halves of surrogate pairs, as undecodable arguments have them
        if unicodedata.category(letter) in ("Cc", "Cs") and letter != "\t":
            raise SamplerError(
                f"{where}: the prompt holds the control character U+{ord(letter):04X}.", 2
            )
    return text


def _prompts(lines: Iterable[bytes], name: str) -> list[str]:
    prompts = []
    for number, raw in enumerate(lines, 1):
        where = f"{name}:{number}"
        if len(raw) > MAX_LINE:
            raise SamplerError(f"{where}: the line is longer than 1 MiB.", 2)
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r\n")
        except UnicodeDecodeError:
            raise SamplerError(f"{where}: this is not UTF-8 text.", 2) from None
        if text and not text.startswith("#"):
            prompts.append(check_prompt(text, where))
    if not prompts:
        raise SamplerError(f"{name}: there is no prompt in it.", 2)
    return prompts
