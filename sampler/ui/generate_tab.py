"""The tab Generate: form on the left, results of one or two sides on the right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from sampler import registry
from sampler.config.schema import STRATEGIES, Config
from sampler.core.image_files import DEFAULT_STRENGTH
from sampler.runs.metadata import scale_of
from sampler.runs.stop import StopFlag
from sampler.ui import pictures
from sampler.ui.form import Form, config_of, new_seed
from sampler.ui.parts import EVENT, Picker, Results, grid_picker, html, picker, results
from sampler.ui.studio import FinishedRun, Preview, Studio, second_rule
from sampler.ui.watch import watch

SIDES = ("A", "B")
LABELS = {  # of the image that a call takes
    "image": "Start from an image",
    "control_image": "Control image",
    "ip_adapter_image": "Image prompt",
}
EXAMPLE = "a red apple on a blue background"
# The style sheet dims images of other settings than those in the form, of each side by itself.
_STALE = "() => {{ {} }}"
_MARK = "document.body.classList.{}('stale-{}');"
# On a narrow page the images are below the form.
_SCROLL = "() => { if (innerWidth < 768) document.getElementById('results').scrollIntoView() }"


@dataclass
class GenerateTab:
    """Components and event handlers of the tab. explain: turns an exception into a sentence."""

    studio: Studio
    explain: Callable[[BaseException], str]
    form: dict[str, Any] = field(default_factory=dict[str, Any])
    inputs: dict[str, Any] = field(default_factory=dict[str, Any])
    pickers: dict[str, dict[str, Picker]] = field(default_factory=dict[str, dict[str, Picker]])
    grids: dict[str, gr.Dropdown] = field(default_factory=dict[str, gr.Dropdown])
    results: dict[str, Results] = field(default_factory=dict[str, Results])
    stops: dict[str | None, StopFlag] = field(default_factory=dict[str | None, StopFlag])

    def build(self) -> None:
        """Build the tab with its event handlers."""
        with gr.Row():
            with gr.Column(scale=4, min_width=320, elem_id="form"):
                self._build_form()
            with gr.Column(scale=7, min_width=320, elem_id="results"):
                self.problem = html("", "problem")
                with gr.Row():
                    for side in SIDES:
                        self.results[side] = results(side, visible=side == "A")
        self._wire()

    def _build_form(self) -> None:
        form = self.form
        with gr.Group():
            form["prompts"] = gr.Textbox(
                EXAMPLE, label="Prompts, one per line", lines=2, max_lines=8, elem_id="prompts"
            )
            form["negative"] = gr.Textbox(
                label="Negative prompt", placeholder="none", elem_id="negative"
            )
        with gr.Row(elem_classes="controls"):
            form["steps"] = gr.Number(20, label="Steps", elem_id="steps")
            form["n"] = gr.Number(1, label="Images each", elem_id="n")
            form["seed"] = gr.Number(0, label="First seed", placeholder="random", elem_id="seed")
        with gr.Accordion("Size", open=False), gr.Row(elem_classes="controls"):
            for name in ("width", "height"):
                form[name] = gr.Number(
                    None, label=f"{name.title()} in pixels", placeholder="model default"
                )
        if self.studio.image_input is not None:
            self._build_image(self.studio.image_input)
        self.compare = gr.Checkbox(
            label="Compare with setting B at the same seeds", elem_id="compare"
        )
        with gr.Tabs():
            for side in SIDES:
                with gr.Tab(f"Setting {side}", visible=side == "A") as self.second:
                    self._strategies(side)
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
            self.stop = gr.Button("Stop", interactive=False, elem_id="stop")

    def _build_image(self, name: str) -> None:
        """Build the fields of the image that a call starts from, or that an adapter follows."""
        label = LABELS[name]
        with gr.Accordion(label, open=name != "image", elem_id="start"):
            self.inputs[name] = gr.Image(
                show_label=False, type="filepath", sources=["upload", "clipboard"], height=220,
                elem_id="image",
            )  # fmt: skip
            if self.studio.takes_strength:
                self.inputs["strength"] = gr.Slider(
                    0.05, 1, DEFAULT_STRENGTH, step=0.05, label="Strength: how much is changed",
                    elem_id="strength",
                )  # fmt: skip

    def _given_inputs(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """Inputs of the stock pipeline's call; none without an image."""
        given = {name: values[c] for name, c in self.inputs.items()}
        name = self.studio.image_input
        if name is None or given[name] is None:
            return {}
        return {**given, name: self.studio.kept(given[name])}

    def _strategies(self, side: str) -> None:
        """Pickers of one side; B starts with another guidance rule than A."""
        first, own = dict(self.studio.defaults), self.studio.defaults["guidance"]
        if side == "B":
            first["guidance"] = second_rule(own)
        self.pickers[side] = {kind: picker(kind, first[kind], side, own) for kind in STRATEGIES}
        self.grids[side] = grid_picker(side, self.studio.config.grid)

    def _wire(self) -> None:
        inputs = {self.compare, *self.form.values(), *self.inputs.values()}
        for side in SIDES:
            inputs |= {c for p in self.pickers[side].values() for c in p.components()}
            inputs |= {self.results[side].run, self.grids[side]}
        outputs = [self.problem, self.generate, self.stop, self.form["seed"]]
        for own in self.results.values():
            outputs += [own.title, own.pictures, own.save, own.saved, own.run]
            outputs += own.exports.values()
            own.save.click(self._save, own.run, [own.saved, self.problem], **EVENT)
        self.generate.click(None, js=_SCROLL, **EVENT)  # first: the run's event ends with the run
        self.generate.click(self._generate, inputs, outputs, concurrency_limit=1, **EVENT)
        shared = [*self.form.values(), *self.inputs.values()]
        self._mark(shared, SIDES)
        for side in SIDES:
            parts = [c for p in self.pickers[side].values() for c in p.components()]
            self._mark([*parts, self.grids[side]], [side])
            # A run has begun: its title differs from the empty one that it starts with.
            js = _STALE.format(_MARK.format("remove", side))
            self.results[side].title.change(None, js=js, **EVENT)
        self.stop.click(self.stop_run, None, None, queue=False, **EVENT)
        self.compare.change(
            lambda on: [gr.update(visible=on)] * 2,
            self.compare,
            [self.second, self.results["B"].column],
            queue=False,
            **EVENT,
        )

    def _mark(self, edited: Sequence[Any], sides: Sequence[str]) -> None:
        """Mark the images of sides when one of these components is edited."""
        js = _STALE.format(" ".join(_MARK.format("add", side) for side in sides))
        gr.on([c.input for c in edited], None, js=js, **EVENT)

    def _configs(self, values: Mapping[Any, Any]) -> dict[str, Config]:
        """Configuration of each side, with the same seed."""
        form = Form(**{name: values[c] for name, c in self.form.items()})
        form = replace(form, inputs=self._given_inputs(values))
        form = form if form.seed is not None else replace(form, seed=new_seed())
        return {
            side: config_of(
                form,
                {kind: p.chosen(values) for kind, p in self.pickers[side].items()},
                self.studio.config,
                values[self.grids[side]],
            )
            for side in (SIDES if values[self.compare] else SIDES[:1])
        }

    def _generate(self, values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        stop = self.stops[request.session_hash] = StopFlag()
        problem = ""
        try:
            configs = self._configs(values)
            seed = next(iter(configs.values())).run.seed
            yield {
                self.problem: "",
                self.generate: gr.update(interactive=False),
                self.stop: gr.update(interactive=True),
                self.form["seed"]: seed,
                **{part: value for side in configs for part, value in self._cleared(side).items()},
            }
            for side, config in configs.items():
                if (old := values[self.results[side].run]) is not None:
                    self.studio.discard(old)
                yield from self._run(side, config, stop)
        except Exception as error:
            problem = self.explain(error)
        yield {
            self.problem: pictures.problem(problem),
            self.generate: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
        }

    def _cleared(self, side: str) -> dict[Any, Any]:
        own = self.results[side]
        return {
            own.title: pictures.title(side, ""),
            own.pictures: pictures.placeholder("Next."),
            own.save: gr.update(interactive=False),
            own.saved: "",
            own.run: None,
            **{box: "" for box in own.exports.values()},
        }

    def _run(self, side: str, config: Config, stop: StopFlag) -> Iterator[dict[Any, Any]]:
        """Updates of one side while it runs, then its results."""
        own = self.results[side]
        count = len(config.prompts.texts or ()) * config.run.n
        yield {
            own.title: pictures.title(side, strategy_names(config)),
            own.pictures: pictures.pending(count),
        }
        for update in watch(lambda show: self.studio.run(config, show, stop)):
            if isinstance(update, Preview):
                yield {own.pictures: pictures.pending(count, update)}
            elif update is None:
                yield {own.pictures: pictures.placeholder("Stopped.")}
            else:
                yield {
                    own.pictures: pictures.finished(update),
                    own.save: gr.update(interactive=True),
                    own.run: update,
                    **{own.exports[form]: text for form, text in update.exports.items()},
                }

    def _save(self, run: FinishedRun) -> tuple[str, str]:
        try:
            return pictures.note(f"Saved in {self.studio.save(run)}"), ""
        except Exception as error:
            return "", pictures.problem(self.explain(error))

    def stop_run(self, request: gr.Request) -> None:
        """Stop the run of a browser's session, if there is one."""
        if stop := self.stops.get(request.session_hash):
            stop.set(2)


def strategy_names(config: Config) -> str:
    """ "ddim, cfg 3, karras"; without a grid where it is the model's own."""
    scale = scale_of(config.guidance)
    scale = default_scale(config.guidance["name"]) if scale is None else scale
    rule = config.guidance["name"] + ("" if scale is None else f" {scale:g}")
    grid = config.model.grid
    names = [config.sampler["name"], rule, *([] if grid is None else [grid_name(grid)])]
    return ", ".join(names)


def grid_name(grid: Any) -> str:
    """The name of a grid; "own levels" for numbers."""
    named = grid.get("name") if isinstance(grid, Mapping) else grid
    return named if isinstance(named, str) else "own levels"


def default_scale(rule: str) -> float | None:
    """Scale that a guidance rule has by default; None without one."""
    fields = registry.describe("guidance", rule)["fields"]
    return next((f["default"] for f in fields if f["name"] == "scale"), None)
