"""Fonts for labels in any script.

Pillow's own font has ASCII and little else; other characters are looked for in the system's fonts.
"""

from __future__ import annotations

import warnings
from typing import Any

from PIL import ImageFont

# File names of fonts with wide coverage: of Linux distributions, macOS and Windows.
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSans-Regular.ttc",
    "wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "unifont.otf",
    "unifont.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc",
    "Arial Unicode.ttf", "ARIALUNI.TTF", "msyh.ttc", "msgothic.ttc", "malgun.ttf",
    "NotoSans-Regular.ttf", "DejaVuSans.ttf", "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "arial.ttf",
)  # fmt: skip
_MISSING = "\U0010ffff"  # no character: every font draws its box for missing ones


def label_font(text: str, size: int) -> Any:
    """Font that draws all of a text: Pillow's, else the first of SYSTEM_FONTS that does.

    Warns, and returns the one that lacks the fewest characters, if there is none.
    """
    best = ImageFont.load_default(size)
    least = missing(best, text)
    for name in SYSTEM_FONTS if least else ():
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        if len(found := missing(font, text)) < len(least):
            best, least = font, found
        if not least:
            break
    if least:
        warnings.warn(
            f"No font here has the characters {least[:20]}; labels show boxes. Install a font such "
            "as Noto Sans CJK.",
            stacklevel=2,
        )
    return best


def missing(font: Any, text: str) -> str:
    """Printable characters of a text that a font lacks."""
    box = bytes(font.getmask(_MISSING))
    return "".join(c for c in dict.fromkeys(text) if not c.isspace() and _is_box(font, c, box))


def _is_box(font: Any, character: str, box: bytes) -> bool:
    return bytes(font.getmask(character)) == box
