"""Build the compact sprite file (npz) of the bundled model's training data from public sources.

    python -m scripts.bundled.prepare_emoji --fluent fluentui-emoji-unicode --noto noto-emoji \
        --blobmoji blobmoji --out sprites.npz

Check the sources out at these commits:

    shuding/fluentui-emoji-unicode  7a40f1a2d064d76e436813edc0f09b6c8cde5da8  MIT
    googlefonts/noto-emoji          41e31b110b4eb929dffb410264694a06205b7ad7  Apache-2.0
    C1710/blobmoji                  437784e59a5dc524aca8b8ea520ea1d889d5643e  Apache-2.0

Later commits of noto-emoji are under another licence. The sprites are not part of this project.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track

CONCEPTS = Path(__file__).with_name("emoji_concepts.csv")
SIDE = 72
"""Sprite side in pixels."""

SVG_SIDE = 256
"""Side at which vector art is rasterised before it is cropped."""

MINIMUM_ALPHA = 0.03
"""The crop box holds every pixel that is more opaque than this."""


class MissingSourceError(Exception):
    """A source picture, or the package that reads it, is not there."""


def read_concepts(path: Path = CONCEPTS) -> list[dict[str, str]]:
    """Return the rows (name, category, codepoint) of the concept list."""
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def find(folder: Path, codepoint: str, pattern: str, joint: str) -> Path:
    """Return the picture of a code point, with or without the emoji variation selector."""
    names = [pattern.format(code) for code in (codepoint, f"{codepoint}{joint}fe0f")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise MissingSourceError(f"{folder} has no {names[0]}; is it the named commit's checkout?")


def read_png(path: Path) -> Image.Image:
    """Read a picture as RGBA."""
    with Image.open(path) as picture:
        return picture.convert("RGBA")


def read_svg(path: Path) -> Image.Image:
    """Rasterise a vector picture to 256 x 256 RGBA with the optional package cairosvg."""
    try:
        import cairosvg  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        message = (
            "the flat style is vector art: install the package cairosvg (and the cairo library)"
        )
        raise MissingSourceError(message) from error
    png = cairosvg.svg2png(url=str(path), output_width=SVG_SIDE, output_height=SVG_SIDE)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def sprite(picture: Image.Image, side: int = SIDE) -> np.ndarray:
    """Return uint8 [side, side, 4], premultiplied: cropped to its alpha, squared, resized.

    Resizing is by box filter when shrinking more than twofold, else by Lanczos, in premultiplied
    colour, so that invisible pixels do not bleed into the edges.
    """
    straight = np.asarray(picture, dtype=np.float32) / 255
    rows, columns = np.nonzero(straight[..., 3] > MINIMUM_ALPHA)
    if len(rows) == 0:
        raise MissingSourceError("the picture is fully transparent")
    cut = straight[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    cut = np.concatenate([cut[..., :3] * cut[..., 3:], cut[..., 3:]], -1)
    height, width = cut.shape[:2]
    square = max(height, width)
    top, left = (square - height) // 2, (square - width) // 2
    padding = ((top, square - height - top), (left, square - width - left), (0, 0))
    padded = np.pad(cut, padding)
    method = Image.Resampling.BOX if square > 2 * side else Image.Resampling.LANCZOS
    channels = [
        Image.fromarray(np.ascontiguousarray(padded[..., c])).resize((side, side), method)
        for c in range(4)
    ]
    resized = np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 1)
    # Lanczos overshoots at edges; a premultiplied colour cannot exceed its alpha.
    resized[..., :3] = np.minimum(resized[..., :3], resized[..., 3:])
    return (resized * 255).round().astype(np.uint8)


def build(fluent: Path, noto: Path, blobmoji: Path, concepts: list[dict[str, str]]) -> np.ndarray:
    """Return sprites uint8 [concepts, 4, 72, 72, 4] in the order glossy, flat, classic, blob."""
    sources: list[tuple[Path, str, str, Callable[[Path], Image.Image]]] = [
        (fluent / "assets", "{}_3d.png", "-", read_png),
        (fluent / "assets", "{}_flat.svg", "-", read_svg),
        (noto / "png" / "128", "emoji_u{}.png", "_", read_png),
        (blobmoji / "png" / "128", "emoji_u{}.png", "_", read_png),
    ]
    made = []
    for row in track(concepts, "sprites"):
        found = [
            (read, find(folder, row["codepoint"], pattern, joint))
            for folder, pattern, joint, read in sources
        ]
        made.append(np.stack([sprite(read(path)) for read, path in found]))
    return np.stack(made)


def save(path: Path, sprites: np.ndarray, concepts: list[dict[str, str]]) -> None:
    """Write the npz under its final name only once it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        np.savez_compressed(
            handle,
            sprites=sprites,
            names=np.array([row["name"] for row in concepts]),
            cats=np.array([row["category"] for row in concepts]),
            codepoints=np.array([row["codepoint"] for row in concepts]),
            styles=np.array(["glossy", "flat", "classic", "blob"]),
        )
    temporary.rename(path)


def main(
    fluent: Annotated[Path, typer.Option(help="Checkout of shuding/fluentui-emoji-unicode.")],
    noto: Annotated[Path, typer.Option(help="Checkout of googlefonts/noto-emoji.")],
    blobmoji: Annotated[Path, typer.Option(help="Checkout of C1710/blobmoji.")],
    out: Annotated[Path, typer.Option(help="File to write (npz).")] = Path("sprites.npz"),
    concepts: Annotated[Path, typer.Option(exists=True, help="Concept list (csv).")] = CONCEPTS,
) -> None:
    """Build the sprite file from checkouts of the three public sources."""
    rows = read_concepts(concepts)
    try:
        save(out, build(fluent, noto, blobmoji, rows), rows)
    except MissingSourceError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{len(rows)} concepts x 4 styles in {out}")


if __name__ == "__main__":
    typer.run(main)
