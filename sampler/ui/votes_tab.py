"""The tab Votes: the images that a fine-tuning waits for, as `sampler vote` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sampler.core.errors import RunFolderError
from sampler.rewards.ballots import BALLOT, by_prompt, open_ballots, read_ballot, save_votes
from sampler.ui import pictures
from sampler.ui.parts import EVENT, html
from sampler.ui.studio import Studio

POLL = 3  # seconds between two looks for new images


class VotesTab:
    """Components and event handlers of the tab."""

    def __init__(self, studio: Studio, explain: Callable[[BaseException], str]) -> None:
        self.studio, self.explain = studio, explain

    def build(self) -> None:
        """Build the tab."""
        html(pictures.note(
            "A fine-tuning with the reward votes shows its images here and waits. An image without "
            "a vote counts for nothing."
        ))  # fmt: skip
        with gr.Row(equal_height=True):
            self.run = gr.Dropdown(
                self._waiting(), value=None, label="Run folder of the training",
                allow_custom_value=True, elem_id="votes-run", scale=4,
            )  # fmt: skip
            look = gr.Button("Show its images", elem_id="votes-look", scale=1)
        self.problem = html("", "votes-problem")
        self.note = html("", "votes-note")
        self.folder, self.timer = gr.State(None), gr.Timer(POLL, active=False)
        outputs = [self.folder, self.problem, self.note, self.timer]
        look.click(self._look, self.run, outputs, **EVENT)
        self.timer.tick(self._look, self.run, outputs, **EVENT)
        self.run.focus(lambda: gr.update(choices=self._waiting()), None, self.run, **EVENT)
        gr.render(inputs=self.folder)(self._ballot)

    def _waiting(self) -> list[str]:
        """Runs below the folder of saved runs whose images wait for votes."""
        runs = {path.parents[2] for path in self.studio.out.glob(f"*/votes/*/{BALLOT}")}
        return sorted(str(run) for run in runs if open_ballots(run))

    def _look(self, run: str | None) -> tuple[str | None, str, str, Any]:
        """The oldest folder that waits; without one, look again in a while."""
        try:
            if not run or not Path(run).expanduser().is_dir():
                raise RunFolderError(f"{run or 'The run folder'}: no such folder.")
            waiting = open_ballots(Path(run).expanduser())
        except Exception as error:
            problem = pictures.problem(self.explain(error))
            return None, problem, "", gr.update(active=False)
        note = f"{waiting[0]}" if waiting else "No image waits for a vote; looking again."
        found = str(waiting[0]) if waiting else None
        return found, "", pictures.note(note), gr.update(active=not waiting)

    def _ballot(self, folder: str | None) -> None:
        """Draw the questions of a folder, and the button that writes the votes."""
        if folder is None:
            return
        place, controls = Path(folder), list[Any]()
        ballot = read_ballot(place)
        for prompt, images in by_prompt(ballot):
            html(pictures.title(prompt, ""))
            controls += _questions(ballot["form"], place, images)
        save = gr.Button("Save the votes", variant="primary", elem_id="votes-save")

        def written(*answers: Any) -> tuple[Any, ...]:
            try:
                save_votes(place, votes(ballot, answers))
            except Exception as error:
                return folder, pictures.problem(self.explain(error)), "", gr.update(active=False)
            return None, "", pictures.note(f"Saved in {place}."), gr.update(active=True)

        outputs = [self.folder, self.problem, self.note, self.timer]
        save.click(written, controls, outputs, **EVENT)


def _questions(form: str, folder: Path, images: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Images of one prompt, with one control per question."""
    found: list[Any] = []
    if form == "pair":
        for a, b in pairwise(images):
            with gr.Row():
                _picture(folder, a)
                _picture(folder, b)
                choices = [str(a["row"]), str(b["row"])]
                found.append(gr.Radio(choices, label="Which is better?", min_width=120))
        return found
    with gr.Row():
        for image in images:
            with gr.Column(min_width=120):
                _picture(folder, image)
                if form == "binary":
                    answers = [("good", 1), ("bad", 0)]
                    found.append(gr.Radio(answers, show_label=False, container=False))
    if form == "rank":
        rows = [str(image["row"]) for image in images]
        found.append(gr.Dropdown(rows, multiselect=True, label="Best first"))
    return found


def _picture(folder: Path, image: Mapping[str, Any]) -> None:
    with Image.open(folder / str(image["file"])) as file:
        gr.Image(
            file.copy(), label=str(image["row"]), interactive=False, min_width=120, height=220,
            buttons=[], elem_classes="vote",
        )  # fmt: skip


def votes(ballot: Mapping[str, Any], answers: Sequence[Any]) -> list[dict[str, Any]]:
    """Lines of votes.jsonl from the answers to the questions of a ballot; None leaves one out."""
    found: list[dict[str, Any]] = []
    left = iter(answers)
    for _, images in by_prompt(ballot):
        rows = [int(image["row"]) for image in images]
        if ballot["form"] == "binary":
            given = [(row, next(left)) for row in rows]
            found += [{"row": row, "vote": vote} for row, vote in given if vote is not None]
        elif ballot["form"] == "pair":
            given = [(a, b, next(left)) for a, b in pairwise(rows)]
            found += [
                {"better": int(better), "worse": a + b - int(better)}
                for a, b, better in given if better is not None
            ]  # fmt: skip
        elif (order := next(left)) and len(order) > 1:
            found.append({"rank": [int(row) for row in order]})
    return found
