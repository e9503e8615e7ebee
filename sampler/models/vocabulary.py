"""Vocabularies of tokenizers: present, and as large as the text encoder's. Imports no torch.

A tokenizer without its vocabulary loads in transformers and turns every prompt into nothing; one of
another model gives other words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sampler.core.errors import ModelError, first_line
from sampler.models.folder import read_json

CONFIG = "tokenizer_config.json"
# Encoders round their vocabulary up, by at most 0.4 % in the supported families.
SMALLEST = 0.9


def check_vocabulary(folder: Path, encoder: Path | None) -> None:
    """Raise ModelError for a tokenizer's folder that is incomplete or does not fit its encoder.

    encoder: the folder of the text encoder that takes its tokens; None if there is none.
    """
    size, path = vocabulary_size(folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is incomplete: {CONFIG} is missing.")
    expected = None if encoder is None else _encoder_size(encoder)
    if expected is not None and not SMALLEST * expected <= size <= expected:
        raise ModelError(
            f"{path} has {size} tokens, and {encoder} takes {expected}: one of them is of another "
            "model or incomplete; copy the tokenizer that belongs to the encoder."
        )


def vocabulary_size(folder: Path) -> tuple[int, Path]:
    """(1 + the largest token id, file) of a tokenizer's folder. ModelError without a vocabulary."""
    for name, read in _READERS.items():
        path = folder / name
        if not path.is_file():
            continue
        if name == "vocab.json" and not (folder / "merges.txt").is_file():
            raise ModelError(f"{folder} is incomplete: vocab.json goes with merges.txt.")
        try:
            size = max(read(path), *_added(folder), 0)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ModelError(
                f"{path} is not a readable vocabulary: {first_line(error):.120}."
            ) from None
        if size:
            return size, path
        raise ModelError(f"{path} is an empty vocabulary.")
    raise ModelError(
        f"{folder} has no vocabulary (tokenizer.json, vocab.json with merges.txt, vocab.txt or a "
        "sentencepiece model); copy the tokenizer's files into it."
    )


def _added(folder: Path) -> Iterator[int]:
    """1 + the ids of tokens that were added beside the vocabulary."""
    yield 0
    for value in read_json(folder / "added_tokens.json").values():
        if isinstance(value, int):
            yield value + 1
    decoder = read_json(folder / CONFIG).get("added_tokens_decoder")
    for key in decoder if isinstance(decoder, dict) else ():
        if str(key).isdecimal():
            yield int(key) + 1


def _fast(path: Path) -> int:
    tree = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]
    size = _ids(vocabulary) if isinstance(vocabulary, dict) else len(vocabulary)
    return max(size, *(token["id"] + 1 for token in tree.get("added_tokens", ())), 0)


def _ids(vocabulary: dict[str, Any]) -> int:
    return max(vocabulary.values(), default=-1) + 1


def _mapping(path: Path) -> int:
    return _ids(json.loads(path.read_text(encoding="utf-8")))


def _lines(path: Path) -> int:
    return sum(1 for line in path.read_bytes().splitlines() if line)


def _pieces(path: Path) -> int:
    """Number of pieces of a sentencepiece model: field 1 of a protobuf message, repeated."""
    data, at, count = path.read_bytes(), 0, 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 2:  # length-delimited
            size, at = _varint(data, at)
            count, at = count + (tag >> 3 == 1), at + size
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        elif tag & 7 == 0:
            _, at = _varint(data, at)
        else:
            raise ValueError("not a sentencepiece model")
    if at != len(data):
        raise ValueError("it ends in the middle of a field")
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


_READERS: dict[str, Callable[[Path], int]] = {
    "tokenizer.json": _fast,
    "vocab.json": _mapping,
    "vocab.txt": _lines,
    "spiece.model": _pieces,
    "tokenizer.model": _pieces,
    "sentencepiece.bpe.model": _pieces,
}


def _encoder_size(folder: Path) -> int | None:
    config = read_json(folder / "config.json")
    for tree in (config, config.get("text_config") or {}):
        size = tree.get("padded_vocab_size") or tree.get("vocab_size")
        if isinstance(size, int):
            return size
    return None
