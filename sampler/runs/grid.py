"""Contact sheets: images of a run side by side, with the values of a sweep as labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from sampler.core.errors import UsageError
from sampler.core.image_files import MAX_PIXELS
from sampler.runs import fonts
from sampler.runs.encodings import decode
from sampler.runs.folder import RunFolder
from sampler.runs.records import cells, shown

CELL, SMALL = 256, 128  # largest and smallest longer side in pixels
PAGE = 100  # images per sheet without axes
GAP, MARGIN, TEXT = 4, 12, 14
_INK, _PAPER = (30, 30, 34), (250, 250, 248)


@dataclass
class Sheet:
    """One page: image files by (row, column), with labels."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], bytes]
    across: str = ""


def sheets(
    run: RunFolder, x: str | None = None, y: str | None = None, columns: int = 0
) -> list[bytes]:
    """Draw the sheets as PNG bytes: axis x across, y down, a sheet per combination of the others.

    By default the last axis goes across and the one before it down. Raises UsageError for an
    unknown axis, and for a run without images.
    """
    found = cells(run)
    if not found:
        raise UsageError(f"{run.store.where} has no image yet.")
    axes = list(found[0][0]["axes"])
    for name in (x, y):
        if name is not None and name not in axes:
            known = ", ".join(axes) or "none"
            raise UsageError(f"The run has no axis {name!r:.60}; it has: {known}.")
    if not axes:
        pages = _plain(found, columns)
    else:
        across = x or next((name for name in reversed(axes) if name != y), axes[-1])
        down = y or next((name for name in reversed(axes) if name != across), None)
        pages = _crossed(found, across, down)
    return [drawn(page) for page in pages]


def _plain(found: list[tuple[dict[str, Any], bytes]], columns: int) -> list[Sheet]:
    pages = []
    for first in range(0, len(found), PAGE):
        part = found[first : first + PAGE]
        wide = columns or min(10, max(1, round(len(part) ** 0.5)))
        cells = {divmod(k, wide): data for k, (_, data) in enumerate(part)}
        height = -(-len(part) // wide)
        numbers = f"images {part[0][0]['index']} to {part[-1][0]['index']}"
        pages.append(Sheet(numbers, [""] * height, [""] * wide, cells))
    return pages


def _crossed(found: list[tuple[dict[str, Any], bytes]], x: str, y: str | None) -> list[Sheet]:
    across = _values(found, x)
    down = _values(found, y) if y else [""]
    pages: dict[Any, Sheet] = {}
    seen: dict[Any, int] = {}
    for record, data in found:
        axes = record["axes"]
        place = (down.index(shown(axes[y])) if y else 0, across.index(shown(axes[x])))
        other = {name: value for name, value in axes.items() if name not in (x, y)}
        prompt = "" if any(name.startswith("prompt") for name in (x, y or "")) else record["prompt"]
        same = (repr(sorted(other.items())), prompt, record["negative_prompt"])
        copy = seen[(same, place)] = seen.get((same, place), -1) + 1
        title = [shown(prompt), *(f"{name} = {shown(value)}" for name, value in other.items())]
        title += [f"copy {copy + 1}"] if copy else []
        page = pages.setdefault(
            (same, copy),
            Sheet(
                "   ".join(part for part in title if part),
                [f"{y} = {value}" if y else "" for value in down],
                across,
                {},
                x,
            ),
        )
        page.cells[place] = data
    return list(pages.values())


def _values(found: Sequence[tuple[dict[str, Any], bytes]], axis: str) -> list[str]:
    return list(dict.fromkeys(shown(record["axes"][axis]) for record, _ in found))


def drawn(sheet: Sheet) -> bytes:
    """Draw a sheet as PNG bytes. Raises UsageError above 64 megapixels."""
    opened = {place: _small(data) for place, data in sheet.cells.items()}
    wide = max(image.width for image in opened.values()) + GAP
    high = max(image.height for image in opened.values()) + GAP
    font = fonts.label_font("".join((sheet.title, *sheet.rows, *sheet.columns)), TEXT)
    corner = f"{sheet.across} =" if sheet.across else ""
    left = MARGIN + max((_width(font, t) + 8 for t in (*sheet.rows, corner) if t), default=0)
    top = MARGIN + (TEXT + 10 if sheet.title else 0) + (TEXT + 8 if any(sheet.columns) else 0)
    size = left + wide * len(sheet.columns) + MARGIN, top + high * len(sheet.rows) + MARGIN
    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError("The sheet would have more than 64 megapixels; sweep less at once.")
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    room = size[0] - 2 * MARGIN
    draw.text((MARGIN, MARGIN), _fitting(font, sheet.title, room), _INK, font)
    draw.text((MARGIN, top - TEXT - 6), corner, _INK, font)
    for column, text in enumerate(sheet.columns):
        place = (left + column * wide, top - TEXT - 6)
        draw.text(place, _fitting(font, text, wide - GAP), _INK, font)
    for row, text in enumerate(sheet.rows):
        draw.text((MARGIN, top + row * high + (high - TEXT) // 2), text, _INK, font)
    for (row, column), image in opened.items():
        canvas.paste(image, (left + column * wide, top + row * high))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _small(data: bytes) -> Image.Image:
    image = Image.fromarray(decode(data)[0])
    if max(image.size) < SMALL:
        factor = -(-SMALL // max(image.size))
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    image.thumbnail((CELL, CELL))
    return image


def _width(font: Any, text: str) -> int:
    return int(font.getlength(text)) + 1


def _fitting(font: Any, text: str, room: int) -> str:
    if _width(font, text) <= room:
        return text
    while text and _width(font, text + "…") > room:
        text = text[:-1]
    return text + "…"
