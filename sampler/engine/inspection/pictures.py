"""Pictures of inspections: heat maps beside images, images in rows, and curves."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from sampler.core.images import to_pixels
from sampler.runs import fonts
from sampler.runs.grid import Sheet, drawn

# From dark to bright, even in lightness; the ends are readable on both sides of an image.
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
_COLOURS = ((31, 86, 165), (204, 85, 0), (34, 120, 60), (120, 40, 130), (90, 90, 90))
_INK, _PAPER, _GRID = (30, 30, 34), (250, 250, 248), (222, 222, 218)


def png(image: Tensor) -> bytes:
    """Encode an image [3, H, W] in [0, 1] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(to_pixels(image[None].float().clamp(0, 1))[0]).save(buffer, "PNG")
    return buffer.getvalue()


def heat(values: Tensor, size: Sequence[int]) -> Tensor:
    """Colours [3, H, W] of a map [h, w] from its least (dark) to its largest value (bright)."""
    low, high = values.min(), values.max()
    unit = (values.float() - low) / (high - low).clamp(min=1e-12)
    large = F.interpolate(unit[None, None], tuple(size), mode="bilinear")[0, 0].clamp(0, 1)
    place = large * (len(HEAT) - 1)
    first = place.floor().clamp(max=len(HEAT) - 2).long()
    colours = torch.tensor(HEAT).float() / 255
    share = (place - first)[..., None]
    return ((1 - share) * colours[first] + share * colours[first + 1]).permute(2, 0, 1)


def overlay(image: Tensor, values: Tensor) -> Tensor:
    """A map as colours over the grey of its image [3, H, W]."""
    grey = image.mean(0, keepdim=True).expand_as(image)
    return 0.45 * grey + 0.55 * heat(values, image.shape[-2:])


def sheet(
    title: str,
    columns: Sequence[str],
    images: Sequence[Sequence[Tensor]],
    names: Sequence[str] = (),
) -> bytes:
    """A sheet of rows of images [3, H, W], as PNG."""
    cells = {
        (row, column): png(image)
        for row, line in enumerate(images)
        for column, image in enumerate(line)
    }
    labels = list(names) if names else [""] * len(images)
    return drawn(Sheet(title, labels, list(columns), cells))


def curves(
    title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str,
    logarithmic: bool = False,
) -> bytes:  # fmt: skip
    """Lines {name: (xs, ys)} as PNG. logarithmic: of both axes; points that are not above 0 and
    numbers that are not finite are left out."""
    width, height, left, top, right, bottom = 640, 400, 74, 40, 20, 56
    scale: Any = math.log10 if logarithmic else float
    kept = {
        name: [
            (scale(a), scale(b))
            for a, b in zip(xs, ys, strict=True)
            if math.isfinite(b) and (not logarithmic or (a > 0 and b > 0))
        ]
        for name, (xs, ys) in series.items()
    }
    points = [point for line in kept.values() for point in line]
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font = fonts.label_font(title + x + y + "".join(series), 13)
    draw.text((left, 4), title, _INK, font)
    draw.text((left, height - 22), x, _INK, font)
    draw.text((8, top - 20), y, _INK, font)
    if points:
        spans = [_span([p[axis] for p in points]) for axis in (0, 1)]
        room = (left, top, width - right, height - bottom)
        _axes(draw, font, spans, room, logarithmic)
        for number, (name, line) in enumerate(kept.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            placed = [_place(point, spans, room) for point in line]
            if len(placed) > 1:
                draw.line(placed, fill=colour, width=2)
            for a, b in placed:
                draw.ellipse((a - 3, b - 3, a + 3, b + 3), fill=colour)
            draw.text((left + 150 + 120 * number, height - 22), name, colour, font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    edge = 0.06 * (high - low) or 0.5
    return low - edge, high + edge


def _place(
    point: tuple[float, float], spans: Sequence[tuple[float, float]], room: Sequence[float]
) -> tuple[float, float]:
    left, top, right, bottom = room
    a, b = ((v - low) / (high - low) for v, (low, high) in zip(point, spans, strict=True))
    return left + a * (right - left), bottom - b * (bottom - top)


def _axes(
    draw: Any, font: Any, spans: Sequence[tuple[float, float]], room: Sequence[float], log: bool
) -> None:
    """Five grid lines per axis with their values."""
    for axis, (low, high) in enumerate(spans):
        for k in range(5):
            value = low + (high - low) * k / 4
            point = (value, spans[1][0]) if axis == 0 else (spans[0][0], value)
            end = (value, spans[1][1]) if axis == 0 else (spans[0][1], value)
            at = _place(point, spans, room)
            draw.line([at, _place(end, spans, room)], fill=_GRID)
            label = f"{10**value if log else value:.3g}"
            text = (at[0] - 14, at[1] + 6) if axis == 0 else (at[0] - 62, at[1] - 8)
            draw.text(text, label, _INK, font)
