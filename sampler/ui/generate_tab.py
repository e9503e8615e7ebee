"""The tab Generate: form on the left; on the right the images of one or two sides, and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from sampler import registry
from sampler.config.schema import STRATEGIES, Config
from sampler.evaluation.best_of import BestOf
from sampler.runs.metadata import scale_of
from sampler.runs.stop import StopFlag
from sampler.ui import pictures
from sampler.ui.form import Choosing, PageInput, config_of, new_seed
from sampler.ui.input_controls import InputControls
from sampler.ui.parts import (
    EVENT,
    Picker,
    Results,
    grid_picker,
    html,
    number_or_none,
    picker,
    results,
)
from sampler.ui.previews import Preview
from sampler.ui.report import report
from sampler.ui.stock import StockRun
from sampler.ui.studio import FinishedRun, Studio, second_rule
from sampler.ui.watch import watch

SIDES = ("A", "B")
EXAMPLES = {"text": "a red apple on a blue background", "class": "0", "": ""}
Update = dict[Any, Any]
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
    choosing: dict[str, Any] = field(default_factory=dict[str, Any])
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
                    with gr.Column(visible=False, min_width=300) as self.stock_column:
                        self.stock_title = html(pictures.title("Stock", ""))
                        self.stock_pictures = html("", "stock-pictures")
                self.report = gr.Markdown("", elem_id="report")
        self._wire()

    def _build_form(self) -> None:
        form, takes = self.form, self.studio.takes
        what = "Classes" if takes.prompt == "class" else "Prompts"
        with gr.Group(visible=takes.prompt != ""):
            form["prompts"] = gr.Textbox(
                EXAMPLES[takes.prompt], label=f"{what}, one per line", lines=2, max_lines=8,
                elem_id="prompts",
            )  # fmt: skip
            form["negative"] = gr.Textbox(
                label="Negative prompt", placeholder="none", elem_id="negative",
                visible=takes.negative,
            )  # fmt: skip
        with gr.Row(elem_classes="controls"):
            form["steps"] = gr.Number(20, label="Steps", elem_id="steps")
            form["n"] = gr.Number(1, label="Images each", elem_id="n")
            form["seed"] = number_or_none(0, "random", label="First seed", elem_id="seed")
        size = gr.Accordion("Size", open=False, visible=takes.size)
        with size, gr.Row(elem_classes="controls"):
            for name in ("width", "height"):
                label = f"{name.title()} in pixels"
                form[name] = number_or_none(None, "model default", label=label, elem_id=name)
        self.inputs = InputControls(takes)
        with gr.Tabs():
            for side in SIDES:
                with gr.Tab(f"Setting {side}", visible=side == "A") as self.second:
                    self._strategies(side)
        self._build_choosing()
        self._build_beside()
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
            self.stop = gr.Button("Stop", interactive=False, elem_id="stop")

    def _build_choosing(self) -> None:
        """Build the fields of best of N."""
        with gr.Accordion("Best of N", open=False, elem_id="best"):
            html(pictures.note(
                "Drafts of few steps from many seeds; a reward chooses those that run in full."
            ))  # fmt: skip
            with gr.Row(elem_classes="controls"):
                self.choosing["count"] = number_or_none(
                    None, "off", label="Candidates per prompt", elem_id="best-count"
                )
                self.choosing["reward"] = gr.Dropdown(
                    rewards(), label="Reward", info="or NAME:OPTION=VALUE", elem_id="best-reward",
                    allow_custom_value=True,
                )  # fmt: skip
                self.choosing["steps"] = number_or_none(
                    None, "a third, from 4", label="Draft steps", elem_id="best-steps"
                )

    def _build_beside(self) -> None:
        """Build the fields of what is shown beside setting A."""
        self.compare = gr.Checkbox(
            label="Compare with setting B at the same seeds", elem_id="compare"
        )
        own = self.studio.defaults["guidance"]
        with gr.Row(elem_classes="controls"):
            self.stock = gr.Checkbox(label="Compare with the stock pipeline", elem_id="stock")
            self.stock_scale = gr.Number(
                own["scale"] if own["name"] == "cfg" else 7.5,
                label="Its CFG scale", elem_id="stock-scale",
            )  # fmt: skip

    def _strategies(self, side: str) -> None:
        """Pickers of one side; B starts with another guidance rule than A."""
        first, own = dict(self.studio.defaults), self.studio.defaults["guidance"]
        if side == "B":
            first["guidance"] = second_rule(own)
        self.pickers[side] = {kind: picker(kind, first[kind], side, own) for kind in STRATEGIES}
        self.grids[side] = grid_picker(side, self.studio.config.grid)

    def _wire(self) -> None:
        shared = [*self.form.values(), *self.inputs.components.values(), *self.choosing.values()]
        inputs = {self.compare, self.stock, self.stock_scale, *shared}
        for side in SIDES:
            inputs |= {c for p in self.pickers[side].values() for c in p.components()}
            inputs |= {self.results[side].run, self.grids[side]}
        outputs = [self.problem, self.generate, self.stop, self.form["seed"], self.report]
        outputs += [self.stock_title, self.stock_pictures]
        for own in self.results.values():
            outputs += [own.title, own.pictures, own.save, own.saved, own.run]
            outputs += [own.drafts, own.drafted, *own.exports.values()]
            own.save.click(self._save, own.run, [own.saved, self.problem], **EVENT)
        self.generate.click(None, js=_SCROLL, **EVENT)  # first: the run's event ends with the run
        self.generate.click(self._generate, inputs, outputs, concurrency_limit=1, **EVENT)
        self._mark(shared, SIDES)
        for side in SIDES:
            parts = [c for p in self.pickers[side].values() for c in p.components()]
            self._mark([*parts, self.grids[side]], [side])
            # A run has begun: its title differs from the empty one that it starts with.
            js = _STALE.format(_MARK.format("remove", side))
            self.results[side].title.change(None, js=js, **EVENT)
        self.stop.click(self.stop_run, None, None, queue=False, **EVENT)
        second = [self.second, self.results["B"].column]
        for box, shown in ((self.compare, second), (self.stock, [self.stock_column])):
            many = len(shown)
            box.change(
                lambda on, many=many: [gr.update(visible=on)] * many if many > 1
                else gr.update(visible=on),
                box, shown, queue=False, **EVENT,
            )  # fmt: skip

    def _mark(self, edited: Sequence[Any], sides: Sequence[str]) -> None:
        """Mark the images of sides when one of these components is edited."""
        js = _STALE.format(" ".join(_MARK.format("add", side) for side in sides))
        gr.on(
            [c.change if isinstance(c, gr.File) else c.input for c in edited], None, js=js, **EVENT
        )

    def configs(self, values: Mapping[Any, Any]) -> dict[str, Config]:
        """Configuration of each side, with the same seed."""
        form = PageInput(
            **{name: values[c] for name, c in self.form.items()},
            inputs=self.inputs.given(values, self.studio.kept),
            prompted=self.studio.takes.prompt != "",
        )
        form = form if str(form.seed).strip() else replace(form, seed=new_seed())
        return {
            side: config_of(
                form,
                {kind: p.chosen(values) for kind, p in self.pickers[side].items()},
                self.studio.config,
                values[self.grids[side]],
            )
            for side in (SIDES if values[self.compare] else SIDES[:1])
        }

    def _generate(self, values: Update, request: gr.Request) -> Iterator[Update]:
        stop = self.stops[request.session_hash] = StopFlag()
        problem, done = "", dict[str, FinishedRun]()
        try:
            configs = self.configs(values)
            best = Choosing(**{name: values[c] for name, c in self.choosing.items()}).best()
            yield {
                self.problem: "",
                self.generate: gr.update(interactive=False),
                self.stop: gr.update(interactive=True),
                self.form["seed"]: str(next(iter(configs.values())).run.seed),
                self.report: "",
                self.stock_pictures: pictures.placeholder("Next."),
                **{part: value for side in configs for part, value in self._cleared(side).items()},
            }
            for side, config in configs.items():
                if (old := values[self.results[side].run]) is not None:
                    self.studio.discard(old)
                yield from self._run(side, config, stop, best, done)
            scale = values[self.stock_scale] if values[self.stock] and not stop() else None
            yield from self._beside(done, scale, stop)
        except Exception as error:
            problem = self.explain(error)
        yield {
            self.problem: pictures.problem(problem),
            self.generate: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
            # Once more: the page may miss the first of two updates that follow each other closely.
            **{self.results[title[0]].save: gr.update(interactive=True) for title in done},
        }

    def _cleared(self, side: str) -> Update:
        own = self.results[side]
        return {
            own.title: pictures.title(side, ""),
            own.pictures: pictures.placeholder("Next."),
            own.save: gr.update(interactive=False),
            own.saved: "",
            own.run: None,
            own.drafts: "",
            own.drafted: gr.update(visible=False),
            **{box: "" for box in own.exports.values()},
        }

    def _run(
        self, side: str, config: Config, stop: StopFlag, best: BestOf | None,
        done: dict[str, FinishedRun],
    ) -> Iterator[Update]:  # fmt: skip
        """Updates of one side while it runs, then its results, which are added to `done`."""
        own = self.results[side]
        count = len(config.prompts.texts or ()) * config.run.n
        yield {
            own.title: pictures.title(side, strategy_names(config)),
            own.pictures: pictures.pending(count),
        }
        for update in watch(lambda show: self.studio.run(config, show, stop, best)):
            if isinstance(update, Preview):
                yield {own.pictures: pictures.pending(count, update)}
            elif update is None:
                yield {own.pictures: pictures.placeholder("Stopped.")}
            else:
                done[strategy_title(side, config)] = update
                yield {
                    own.pictures: pictures.finished(update),
                    own.drafts: pictures.drafts(update),
                    own.drafted: gr.update(visible=update.drafts is not None),
                    own.save: gr.update(interactive=True),
                    own.run: update,
                    **{own.exports[form]: text for form, text in update.exports.items()},
                }

    def _beside(
        self, done: Mapping[str, FinishedRun], scale: float | None, stop: StopFlag
    ) -> Iterator[Update]:
        """Updates of the report, with the stock pipeline at a CFG scale unless that is None."""
        if not done:
            return
        first, stock = next(iter(done.values())), None
        yield {self.report: report(done, None)}
        if scale is None:
            return
        yield {self.stock_pictures: pictures.placeholder("At work.")}
        for update in watch(lambda _: self.studio.run_stock(first, scale, stop)):
            stock = update if isinstance(update, StockRun) else None
        if stock is None:
            yield {self.stock_pictures: pictures.placeholder("Stopped.")}
            return
        several = len(first.config.prompts.texts or ()) > 1
        title = f"{stock.scheduler}, CFG {stock.scale:g}"
        yield {
            self.stock_title: pictures.title("Stock", title),
            self.stock_pictures: pictures.stock(stock, several),
            self.report: report(done, stock),
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


def strategy_title(side: str, config: Config) -> str:
    """ "A ddim, cfg 3"."""
    return f"{side} {strategy_names(config)}"


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


def rewards() -> list[str]:
    """Names of the rewards that need no file and choose among images by themselves."""
    known = {name: registry.describe("reward", name)["fields"] for name in registry.names("reward")}
    needing = ("path", "reward", "rewards")
    return [
        name
        for name, fields in known.items()
        if name != "votes" and not any(f["name"] in needing and not f["default"] for f in fields)
    ]
