"""The page: what is asked for on the left, what came of it on the right, one side or two."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import gradio as gr

from sampler.config.schema import STRATEGIES, Config
from sampler.runs.location import StopFlag
from sampler.runs.metadata import scale_of
from sampler.ui import pictures
from sampler.ui.form import Form, config_of, new_seed
from sampler.ui.parts import Picker, Results, html, picker, results
from sampler.ui.studio import Look, Made, Studio

SIDES = ("A", "B")
EXAMPLES = "a red apple on a blue background"
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Page:
    """The components, and what happens when they are used. explain: an exception as a sentence."""

    studio: Studio
    explain: Callable[[BaseException], str]
    form: dict[str, Any] = field(default_factory=dict[str, Any])
    pickers: dict[str, dict[str, Picker]] = field(default_factory=dict[str, dict[str, Picker]])
    results: dict[str, Results] = field(default_factory=dict[str, Results])
    stops: dict[str | None, StopFlag] = field(default_factory=dict[str | None, StopFlag])

    def blocks(self) -> gr.Blocks:
        """The page, drawn and wired."""
        with gr.Blocks(title="sampler", analytics_enabled=False, fill_width=True) as blocks:
            model = self.studio.model
            html(
                f"<h1>Playground</h1><p>Model {escape(model.label)}. A sampler and a guidance "
                "rule, or two settings side by side at the same seeds.</p>",
                "head",
            )
            with gr.Row():
                with gr.Column(scale=4, min_width=320, elem_id="asked"):
                    self._ask()
                with gr.Column(scale=7, min_width=320):
                    self.problem = html("", "problem")
                    with gr.Row():
                        for side in SIDES:
                            self.results[side] = results(side, visible=side == "A")
            self._wire(blocks)
        return blocks

    def _ask(self) -> None:
        form = self.form
        with gr.Group():
            form["prompts"] = gr.Textbox(
                EXAMPLES, label="Prompts, one per line", lines=2, max_lines=8, elem_id="prompts"
            )
            form["negative"] = gr.Textbox(
                label="Negative prompt", placeholder="none", elem_id="negative"
            )
        with gr.Row(elem_classes="controls"):
            form["steps"] = gr.Number(20, label="Steps", elem_id="steps")
            form["n"] = gr.Number(1, label="Images each", elem_id="n")
            form["seed"] = gr.Number(0, label="First seed", placeholder="a new one", elem_id="seed")
        with gr.Accordion("Size", open=False), gr.Row(elem_classes="controls"):
            for name in ("width", "height"):
                form[name] = gr.Number(
                    None, label=f"{name.title()} in pixels", placeholder="the model's own"
                )
        self.compare = gr.Checkbox(
            label="Compare with a second setting, B, at the same seeds", elem_id="compare"
        )
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="generate")
            self.halt = gr.Button("Stop", interactive=False, elem_id="stop")
        with gr.Tabs():
            for side in SIDES:
                with gr.Tab(f"Setting {side}", visible=side == "A") as self.second:
                    self._strategies(side)

    def _strategies(self, side: str) -> None:
        """The sampler and the guidance of a side; B begins with another rule than A."""
        first = dict(self.studio.defaults)
        if side == "B":
            first["guidance"] = {"name": "none" if first["guidance"]["name"] == "apg" else "apg"}
        self.pickers[side] = {kind: picker(kind, first[kind], side) for kind in STRATEGIES}

    def _wire(self, blocks: gr.Blocks) -> None:
        asked = {self.compare, *self.form.values()}
        for side in SIDES:
            asked |= {c for p in self.pickers[side].values() for c in p.components()}
            asked |= {self.results[side].made}
        told = [self.problem, self.go, self.halt, self.form["seed"]]
        for own in self.results.values():
            told += [own.title, own.pictures, own.keep, own.kept, own.made, *own.texts.values()]
            own.keep.click(self._keep, own.made, [own.kept, self.problem], **_QUIET)
        self.go.click(self._generate, asked, told, concurrency_limit=1, **_QUIET)
        self.halt.click(self._stop, None, None, queue=False, **_QUIET)
        self.compare.change(
            lambda on: [gr.update(visible=on)] * 2,
            self.compare,
            [self.second, self.results["B"].column],
            queue=False,
            **_QUIET,
        )
        blocks.unload(self._stop)

    def _configs(self, values: Mapping[Any, Any]) -> dict[str, Config]:
        """The configuration of every side, at one seed."""
        form = Form(**{name: values[c] for name, c in self.form.items()})
        form = form if form.seed is not None else replace(form, seed=new_seed())
        return {
            side: config_of(
                form,
                {kind: p.chosen(values) for kind, p in self.pickers[side].items()},
                self.studio.config,
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
                self.go: gr.update(interactive=False),
                self.halt: gr.update(interactive=True),
                self.form["seed"]: seed,
                **{part: value for side in configs for part, value in self._cleared(side).items()},
            }
            for side, config in configs.items():
                if (old := values[self.results[side].made]) is not None:
                    self.studio.forget(old)
                yield from self._run(side, config, stop)
        except Exception as error:
            problem = self.explain(error)
        yield {
            self.problem: pictures.problem(problem),
            self.go: gr.update(interactive=True),
            self.halt: gr.update(interactive=False),
        }

    def _cleared(self, side: str) -> dict[Any, Any]:
        own = self.results[side]
        return {
            own.pictures: pictures.nothing("Next."),
            own.keep: gr.update(interactive=False),
            own.kept: "",
            own.made: None,
            **{box: "" for box in own.texts.values()},
        }

    def _run(self, side: str, config: Config, stop: StopFlag) -> Iterator[dict[Any, Any]]:
        """A side at work, and its results."""
        own = self.results[side]
        count = len(config.prompts.texts or ()) * config.run.n
        yield {own.title: pictures.title(side, named(config)), own.pictures: pictures.coming(count)}
        for seen in at_work(self.studio, config, stop):
            if isinstance(seen, Look):
                yield {own.pictures: pictures.coming(count, seen)}
            elif seen is None:
                yield {own.pictures: pictures.nothing("Stopped.")}
            else:
                yield {
                    own.pictures: pictures.finished(seen),
                    own.keep: gr.update(interactive=True),
                    own.made: seen,
                    **{own.texts[form]: text for form, text in seen.texts.items()},
                }

    def _keep(self, made: Made) -> tuple[str, str]:
        try:
            return pictures.note(f"Saved in {self.studio.keep(made)}"), ""
        except Exception as error:
            return "", pictures.problem(self.explain(error))

    def _stop(self, request: gr.Request) -> None:
        if stop := self.stops.get(request.session_hash):
            stop.set(2)


def named(config: Config) -> str:
    """ "ddim, cfg 3"."""
    scale = scale_of(config.guidance)
    rule = config.guidance["name"] + ("" if scale is None else f" {scale:g}")
    return f"{config.sampler['name']}, {rule}"


def at_work(studio: Studio, config: Config, stop: StopFlag) -> Iterator[Look | Made | None]:
    """What is seen of a run on the way, and at last what was made; None where it was stopped."""
    seen: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            seen.put(studio.make(config, seen.put, stop))
        except BaseException as error:
            seen.put(error)

    threading.Thread(target=work, daemon=True).start()
    while isinstance(found := seen.get(), Look):
        yield found
    if isinstance(found, BaseException):
        raise found
    yield found
