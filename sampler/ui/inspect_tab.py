"""The tab Inspect: where images attend to words, and what blocks know of labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from sampler.core.batch import to_output
from sampler.core.errors import SamplerError, UsageError
from sampler.engine.inspection.attention import table_of
from sampler.engine.inspection.classify import block_table
from sampler.engine.inspection.features import check_adapter
from sampler.engine.inspection.pictures import overlay
from sampler.evaluation.image_sets import read_images, read_labels
from sampler.ui import pictures
from sampler.ui.generate_form import GenerateForm
from sampler.ui.parts import EVENT, html
from sampler.ui.studio import Studio

SCORES = [
    ("attention alone", "attention"),
    ("times the gradient of the guidance (Grad-SAM)", "guidance"),
]
LIMIT = 1000  # images of a folder
Rows = list[dict[str, Any]]


class InspectTab:
    """Components and event handlers; form: the form with prompts, seeds and setting A."""

    def __init__(
        self, studio: Studio, explain: Callable[[BaseException], str], form: GenerateForm
    ) -> None:
        self.studio, self.explain, self.form = studio, explain, form

    def build(self) -> None:
        """Build the tab; for a model that cannot be inspected, the reason."""
        try:
            check_adapter(self.studio.engine, "Inspect")
        except SamplerError as error:
            html(pictures.note(str(error)), "inspect-refused")
            return
        self.problem = html("", "inspect-problem")
        with gr.Tabs():
            with gr.Tab("Words"):
                self._build_words()
            with gr.Tab("Blocks"):
                self._build_blocks()

    def _build_words(self) -> None:
        html(pictures.note(
            "Generates the images of setting A again, with its prompts, seeds and steps, and draws "
            "where they attend to the words. Dark is little attention, bright is much."
        ))  # fmt: skip
        with gr.Row():
            self.words = gr.Textbox(
                label="Words", placeholder="all words of the prompts", elem_id="words",
                info="separated by spaces",
            )  # fmt: skip
            self.score = gr.Dropdown(
                SCORES, value="attention", label="Map", elem_id="score", allow_custom_value=True,
                info="or a differentiable reward",
            )  # fmt: skip
        button = gr.Button("Draw the maps", variant="primary", elem_id="draw")
        gallery = gr.Gallery(
            label="Maps", columns=4, height="auto", object_fit="contain",
            elem_id="maps", visible=False,
        )  # fmt: skip
        table = gr.Dataframe(label="Regions of the maps", elem_id="regions", visible=False)
        inputs = {self.words, self.score} | self.form.components()

        def draw(values: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
            yield from self._shown(lambda: self._maps(values), gallery, table, button)

        button.click(
            draw, inputs, [self.problem, gallery, table, button], concurrency_limit=1, **EVENT,
        )  # fmt: skip

    def _build_blocks(self) -> None:
        html(pictures.note(
            "Reads labels of images from the features of each block by ridge regression: seven of "
            "ten images fit the probes, the others test them."
        ))  # fmt: skip
        with gr.Row():
            folder = gr.Textbox(
                label="Images", placeholder="run folder or folder", elem_id="images"
            )
            labels = gr.Textbox(
                label="Labels", placeholder="labels.csv", elem_id="labels",
                info="CSV with a column file, and columns of labels",
            )  # fmt: skip
            share = gr.Number(
                0.15, label="Noise", info="share of the training times, 0 to 1", elem_id="share"
            )
        button = gr.Button("Measure the blocks", variant="primary", elem_id="measure")
        table = gr.Dataframe(label="Accuracy of the probes", elem_id="accuracy", visible=False)

        def measure(*given: Any) -> Iterator[dict[Any, Any]]:
            yield from self._shown(lambda: (None, self._blocks(*given)), None, table, button)

        button.click(
            measure, [folder, labels, share], [self.problem, table, button],
            concurrency_limit=1, **EVENT,
        )  # fmt: skip

    def _shown(
        self, work: Callable[[], tuple[Any, Rows]], gallery: Any, table: Any, button: Any
    ) -> Iterator[dict[Any, Any]]:
        """Updates of the page around some work: its pictures and its table, or a sentence."""
        yield {self.problem: "", button: gr.update(interactive=False, value="At work ...")}
        done: dict[Any, Any] = {button: gr.update(interactive=True, value=button.value)}
        try:
            with self.studio.busy:
                found, rows = work()
            if gallery is not None:
                done[gallery] = gr.update(value=found, visible=True)
            headers = [*rows[0]]
            values = [[row[name] for name in headers] for row in rows]
            done[table] = gr.update(value={"headers": headers, "data": values}, visible=True)
        except Exception as error:
            done[self.problem] = pictures.problem(self.explain(error))
        yield done

    def _maps(self, values: Mapping[Any, Any]) -> tuple[list[tuple[Any, str]], Rows]:
        """Pictures with captions, and the table of `sampler inspect attention`."""
        config = self.form.configs(values)["A"]
        if config.inputs:
            raise UsageError("Maps are drawn of images from prompts; take the input images out.")
        run, texts = config.run, config.prompts.texts or ()
        words = str(values[self.words] or "").replace(",", " ").split()
        seeds = [int(run.seed or 0) + k for _ in texts for k in range(run.n)]
        found = self.studio.engine.with_grid(config.model.grid).attention(
            list(texts), words or None, score=values[self.score], negative=run.negative_prompt,
            seeds=seeds, n=run.n, steps=run.steps, height=run.height, width=run.width,
            sampler=config.sampler, guidance=config.guidance,
        )  # fmt: skip
        prompts = [text for text in texts for _ in range(run.n)]
        rows, shown = table_of(found, prompts), list[tuple[Any, str]]()
        for i, (image, maps) in enumerate(zip(found.images, found.maps, strict=True)):
            shown.append((to_output(image[None], "pil")[0], f"{prompts[i]}, seed {found.seeds[i]}"))
            for name, attended in maps.items():
                shown.append((to_output(overlay(image, attended)[None], "pil")[0], name))
        return shown, rows

    def _blocks(self, folder: str, labels: str, share: float | None) -> Rows:
        """The table of `sampler inspect features`."""
        if not folder.strip() or not labels.strip():
            raise UsageError("Give a folder of images, and a CSV file with their labels.")
        if share is None or not 0 <= share <= 1:
            raise UsageError(f"Noise = {share} must lie in 0..1, a share of the training times.")
        engine = self.studio.engine
        images = read_images(folder.strip(), engine.pipeline, LIMIT)
        named = read_labels(Path(labels.strip()).expanduser(), images.names)
        return block_table(engine, images.pixels, named, [share], engine.pipeline.blocks[1:])
