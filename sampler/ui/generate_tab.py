"""The tab Generate: form on the left; on the right the images of one or two sides, and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from sampler import registry
from sampler.config.schema import Config
from sampler.evaluation.best_of import BestOf
from sampler.runs.metadata import scale_of
from sampler.runs.stop import StopFlag
from sampler.ui import pictures
from sampler.ui.generate_form import SIDES, GenerateForm
from sampler.ui.parts import EVENT, Results, html, results
from sampler.ui.previews import Preview
from sampler.ui.report import report
from sampler.ui.stock import StockRun
from sampler.ui.studio import FinishedRun, Studio
from sampler.ui.watch import watch

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
    form: GenerateForm
    results: dict[str, Results] = field(default_factory=dict[str, Results])
    stops: dict[str | None, StopFlag] = field(default_factory=dict[str | None, StopFlag])

    def build(self) -> None:
        """Build the tab with its event handlers."""
        with gr.Row():
            with gr.Column(scale=4, min_width=320, elem_id="form"):
                self.form.build()
                with gr.Row(elem_id="actions"):
                    self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    self.stop = gr.Button("Stop", interactive=False, elem_id="stop")
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

    def _wire(self) -> None:
        form = self.form
        inputs: set[Any] = form.components() | {own.run for own in self.results.values()}
        outputs = [self.problem, self.generate, self.stop, form.fields["seed"], self.report]
        outputs += [self.stock_title, self.stock_pictures]
        for own in self.results.values():
            outputs += [own.title, own.pictures, own.save, own.saved, own.run]
            outputs += [own.drafts, own.drafted, *own.exports.values()]
            own.save.click(self._save, own.run, [own.saved, self.problem], **EVENT)
        self.generate.click(None, js=_SCROLL, **EVENT)  # first: the run's event ends with the run
        self.generate.click(self._generate, inputs, outputs, concurrency_limit=1, **EVENT)
        self._mark(form.shared(), SIDES)
        for side in SIDES:
            self._mark(form.of_side(side), [side])
            # A run has begun: its title differs from the empty one that it starts with.
            js = _STALE.format(_MARK.format("remove", side))
            self.results[side].title.change(None, js=js, **EVENT)
        self.stop.click(self.stop_run, None, None, queue=False, **EVENT)
        second = [form.second, self.results["B"].column]
        for box, shown in ((form.compare, second), (form.stock, [self.stock_column])):
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

    def _generate(self, values: Update, request: gr.Request) -> Iterator[Update]:
        stop = self.stops[request.session_hash] = StopFlag()
        problem, done = "", dict[str, FinishedRun]()
        try:
            configs, best = self.form.configs(values), self.form.best(values)
            yield {
                self.problem: "",
                self.generate: gr.update(interactive=False),
                self.stop: gr.update(interactive=True),
                self.form.fields["seed"]: str(next(iter(configs.values())).run.seed),
                self.report: "",
                self.stock_pictures: pictures.placeholder("Next."),
                **{part: value for side in configs for part, value in self._cleared(side).items()},
            }
            for side, config in configs.items():
                if (old := values[self.results[side].run]) is not None:
                    self.studio.discard(old)
                yield from self._run(side, config, stop, best, done)
            form = self.form
            scale = values[form.stock_scale] if values[form.stock] and not stop() else None
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
