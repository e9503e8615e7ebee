"""Pictures with what they cost, as HTML. Everything that comes from a user is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from sampler.ui.studio import Look, Made

FILES = "/gradio_api/file="  # where the page's server hands out files below the temporary folder
_EMPTY = '<p class="nothing">{}</p>'


def nothing(text: str = "The images appear here.") -> str:
    """The place of pictures before there are any."""
    return _EMPTY.format(escape(text))


def coming(count: int, look: Look | None = None) -> str:
    """The pictures of a run at work, of `count` images: those that are looked at, and frames."""
    shown: dict[int, str] = {}
    if look is not None:
        for row, image in enumerate(look.images):
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=80)
            data = base64.b64encode(buffer.getvalue()).decode()
            shown[look.done + row] = f'<img src="data:image/webp;base64,{data}" alt="preview">'
    figures = []
    for number in range(count):
        text = "waiting"
        if look is not None:
            text = "done" if number < look.done else f"step {look.step} of {look.steps}"
        frame = shown.get(number, '<div class="frame"></div>')
        figures.append(_figure(frame, f"<b>{text}</b>", "at-work"))
    return _grid(figures)


def finished(made: Made) -> str:
    """The pictures of a run: each with the rows evaluated for it, its time, seed and prompt."""
    figures = []
    several = len(made.config.prompts.texts or ()) > 1
    for record in made.records:
        prompt = escape(record["prompt"])
        seed = f"seed {record['seed']}"
        if record["file"] is None:
            frame = f'<div class="frame">{escape(record["error"] or record["status"])}</div>'
            figures.append(_figure(frame, f"<span>{seed}</span>", "failed"))
            continue
        link = FILES + quote(str(made.folder / record["file"]))
        frame = (
            f'<a href="{link}" target="_blank" title="Open the image">'
            f'<img src="{link}" alt="{prompt[:300]}"></a>'
        )
        cost = f"<b>{record['nfe']} rows · {seconds(made.seconds)}</b>"
        under = f"<span>{seed}{f' · {prompt}' if several else ''}</span>"
        notes = "".join(f"<span>{escape(note)}</span>" for note in record["warnings"])
        figures.append(_figure(frame, cost + under + notes, "made"))
    return _grid(figures)


def seconds(value: float) -> str:
    """ "0.42 s", "12.3 s": three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} s"


def title(side: str, text: str) -> str:
    """What stands above a side."""
    return f'<p class="title"><b>{side}</b> {escape(text)}</p>'


def problem(text: str) -> str:
    """What went wrong, as the page shows it; nothing for no text."""
    return f'<p class="problem" role="alert">{escape(text)}</p>' if text else ""


def note(text: str) -> str:
    """What is told beside a button."""
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _figure(frame: str, caption: str, kind: str) -> str:
    return f'<figure class="{kind}">{frame}<figcaption>{caption}</figcaption></figure>'


def _grid(figures: Sequence[str]) -> str:
    few = " few" if len(figures) <= 2 else ""
    return f'<div class="pictures{few}">{"".join(figures)}</div>'
