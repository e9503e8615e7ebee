"""HTML of the page: images with their cost, titles, messages; jinja2 escapes every value."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from PIL import Image

from sampler.ui.previews import Preview
from sampler.ui.stock import StockRun
from sampler.ui.studio import FinishedRun, reason
from sampler.workers.best_of import DRAFTS

FILES = "/gradio_api/file="  # URL prefix of files below the server's temporary folder

_TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_FIGURES = _TEMPLATES.from_string("""\
<div class="pictures{{ ' few' if figures|length <= 2 }}">
{% for f in figures %}
<figure class="{{ f.kind }}">
  {% if f.media == "video" %}
  <video src="{{ f.link }}" controls loop></video>
  {% elif f.media == "audio" %}
  <audio src="{{ f.link }}" controls></audio>
  {% elif f.link %}
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
</div>
{% for note in notes %}
<p class="note">{{ note }}.</p>
{% endfor %}""")
_TITLE = _TEMPLATES.from_string('<p class="title"><b>{{ side }}</b> {{ text }}</p>')
_PARAGRAPH = _TEMPLATES.from_string(
    '{% if text %}<p class="{{ kind }}"{{ " role=alert" if alert }}>{{ text }}</p>{% endif %}'
)


def placeholder(text: str = "The images appear here.") -> str:
    """The area of the images before there are any."""
    return _PARAGRAPH.render(kind="nothing", text=text)


def pending(count: int, preview: Preview | None = None) -> str:
    """A running batch: previews of those in work, frames for the others.

    count: of the images where there is no preview yet.
    """
    images = {}
    if preview is not None:
        count = preview.total
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
    scores = _scores(run.drafts.choices, "chosen", "final_scores") if run.drafts else {}
    figures: list[dict[str, Any]] = []
    for record in run.records:
        figure = _figure(
            run.folder, record, f"{record['nfe']} NFE · {seconds(run.seconds)} per image"
        )
        score = scores.get((record["prompt"], record["seed"]))
        figure["lines"] = [
            _line(record, several, score),
            *(record["warnings"] if record["file"] else ()),
        ]
        figures.append(figure)
    return _FIGURES.render(figures=figures, notes=run.notes)


def drafts(run: FinishedRun) -> str:
    """All drafts of a run by score, the chosen ones marked; empty for a run without."""
    if run.drafts is None:
        return ""
    scores = _scores(run.drafts.choices, "seeds", "scores")
    chosen = _scores(run.drafts.choices, "chosen", "final_scores")
    several = len(run.config.prompts.texts or ()) > 1
    figures: list[dict[str, Any]] = []
    for record in run.drafts.records:
        key = (record["prompt"], record["seed"])
        figure = _figure(run.folder / DRAFTS, record, f"{scores[key]:.3g}")
        figure["kind"] += " chosen" if key in chosen else ""
        figures.append({**figure, "lines": [_line(record, several)], "score": scores[key]})
    figures.sort(key=lambda figure: -figure["score"])
    return _FIGURES.render(figures=figures)


def stock(run: StockRun, several: bool) -> str:
    """The images of the stock pipeline."""
    figures = [
        {
            "kind": "made",
            "media": "image",
            "link": FILES + quote(str(path)),
            "alt": prompt[:300],
            "title": f"{nfe} NFE · {seconds(run.seconds)} per image",
            "lines": [f"seed {seed}" + (f" · {prompt}" if several else "")],
        }
        for ((prompt, _, seed), path), nfe in zip(run.files.items(), run.nfe, strict=True)
    ]
    return _FIGURES.render(figures=figures)


def _figure(folder: Path, record: Mapping[str, Any], title: str) -> dict[str, Any]:
    """Figure of a record; a frame with the reason where there is no file."""
    if record["file"] is None:
        frame = reason(record["error"]) if record["error"] else record["status"]
        return {"kind": "failed", "frame": frame}
    suffix = Path(record["file"]).suffix
    return {
        "kind": "made",
        "media": {".wav": "audio", ".mp4": "video"}.get(suffix, "image"),
        "link": FILES + quote(str(folder / record["file"])),
        "alt": record["prompt"][:300],
        "title": title,
    }


def _line(record: Mapping[str, Any], several: bool, score: float | None = None) -> str:
    """Seed of an image, its score, and its prompt where there are several."""
    parts = [f"seed {record['seed']}"]
    parts += [] if score is None else [f"score {score:.3g}"]
    return " · ".join([*parts, *([record["prompt"]] if several else ())])


def _scores(
    choices: Sequence[Mapping[str, Any]], seeds: str, scores: str
) -> dict[tuple[str, int], float]:
    return {
        (choice["prompt"], seed): score
        for choice in choices
        for seed, score in zip(choice[seeds], choice[scores], strict=True)
    }


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
