"""HTML of the page: images with their cost, titles, messages; jinja2 escapes every value."""

from __future__ import annotations

import base64
import io
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from PIL import Image

from sampler.ui.studio import FinishedRun, Preview, reason

FILES = "/gradio_api/file="  # URL prefix of files below the server's temporary folder

_TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_FIGURES = _TEMPLATES.from_string("""\
<div class="pictures{{ ' few' if figures|length <= 2 }}">
{% for f in figures %}
<figure class="{{ f.kind }}">
  {% if f.link %}
  <a href="{{ f.link }}" target="_blank" title="Open the image"><img src="{{ f.link }}" \
alt="{{ f.alt }}"></a>
  {% elif f.source %}
  <img src="{{ f.source }}" alt="{{ f.alt }}">
  {% else %}
  <div class="frame">{{ f.frame }}</div>
  {% endif %}
  <figcaption>{% if f.title %}<b>{{ f.title }}</b>{% endif %}
  {% for line in f.lines %}<span>{{ line }}</span>{% endfor %}</figcaption>
</figure>
{% endfor %}
</div>""")
_TITLE = _TEMPLATES.from_string('<p class="title"><b>{{ side }}</b> {{ text }}</p>')
_PARAGRAPH = _TEMPLATES.from_string(
    '{% if text %}<p class="{{ kind }}"{{ " role=alert" if alert }}>{{ text }}</p>{% endif %}'
)


def placeholder(text: str = "The images appear here.") -> str:
    """The area of the images before there are any."""
    return _PARAGRAPH.render(kind="nothing", text=text)


def pending(count: int, preview: Preview | None = None) -> str:
    """A running batch of `count` images: previews of those in work, frames for the others."""
    images = {}
    if preview is not None:
        images = {preview.done + k: _data_url(image) for k, image in enumerate(preview.images)}

    def status(number: int) -> str:
        if preview is None:
            return "waiting"
        return "done" if number < preview.done else f"step {preview.step} of {preview.steps}"

    return _FIGURES.render(
        figures=[
            {"kind": "at-work", "source": images.get(k), "alt": "preview", "title": status(k)}
            for k in range(count)
        ]
    )


def finished(run: FinishedRun) -> str:
    """The images of a run: each with its NFE, seconds, seed and, if there are several, prompt."""
    several = len(run.config.prompts.texts or ()) > 1
    figures: list[dict[str, Any]] = []
    for record in run.records:
        lines = [f"seed {record['seed']}"]
        if record["file"] is None:
            frame = reason(record["error"]) if record["error"] else record["status"]
            figures.append({"kind": "failed", "frame": frame, "lines": lines})
            continue
        if several:
            lines[0] += f" · {record['prompt']}"
        figures.append(
            {
                "kind": "made",
                "link": FILES + quote(str(run.folder / record["file"])),
                "alt": record["prompt"][:300],
                "title": f"{record['nfe']} NFE · {seconds(run.seconds)} per image",
                "lines": [*lines, *record["warnings"]],
            }
        )
    return _FIGURES.render(figures=figures)


def seconds(value: float) -> str:
    """ "0.42 s", "12.3 s": three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} s"


def heading(model: str) -> str:
    """The head of the page."""
    return _TEMPLATES.from_string(
        "<h1>Playground</h1><p>Model {{ model }}. Try a sampler and a guidance rule, or compare "
        "two settings at the same seeds.</p>"
    ).render(model=model)


def title(side: str, text: str) -> str:
    """The line above one side's images."""
    return _TITLE.render(side=side, text=text)


def problem(text: str) -> str:
    """An error message; empty for an empty text."""
    return _PARAGRAPH.render(kind="problem", text=text, alert=True)


def note(text: str) -> str:
    """A note beside a control; empty for an empty text."""
    return _PARAGRAPH.render(kind="note", text=text)


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
