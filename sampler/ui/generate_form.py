"""The form of the tab Generate: prompts, seeds, inputs, and the strategies of two sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from sampler import registry
from sampler.config.schema import STRATEGIES, Config
from sampler.evaluation.best_of import BestOf
from sampler.ui import pictures
from sampler.ui.form import Choosing, PageInput, config_of, new_seed
from sampler.ui.input_controls import InputControls
from sampler.ui.parts import Picker, grid_picker, html, number_or_none, picker
from sampler.ui.studio import Studio, second_rule

SIDES = ("A", "B")
EXAMPLES = {"text": "a red apple on a blue background", "class": "0", "": ""}


@dataclass
class GenerateForm:
    """Components of the form. fields: those that both sides share, named as in PageInput."""

    studio: Studio
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    choosing: dict[str, Any] = field(default_factory=dict[str, Any])
    pickers: dict[str, dict[str, Picker]] = field(default_factory=dict[str, dict[str, Picker]])
    grids: dict[str, gr.Dropdown] = field(default_factory=dict[str, gr.Dropdown])

    def build(self) -> None:
        """Build the form, without the buttons below it."""
        form, takes = self.fields, self.studio.takes
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

    def shared(self) -> list[Any]:
        """Components whose values are part of every side's run."""
        return [*self.fields.values(), *self.inputs.components.values(), *self.choosing.values()]

    def of_side(self, side: str) -> list[Any]:
        """Components of one side's strategies and grid."""
        parts = [c for p in self.pickers[side].values() for c in p.components()]
        return [*parts, self.grids[side]]

    def components(self) -> set[Any]:
        """All components, as the inputs of an event."""
        sides = {c for side in SIDES for c in self.of_side(side)}
        return {self.compare, self.stock, self.stock_scale, *self.shared()} | sides

    def configs(self, values: Mapping[Any, Any]) -> dict[str, Config]:
        """Configuration of each side, with the same seed."""
        form = PageInput(
            **{name: values[c] for name, c in self.fields.items()},
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

    def best(self, values: Mapping[Any, Any]) -> BestOf | None:
        """Return the request for best of N, None without one."""
        return Choosing(**{name: values[c] for name, c in self.choosing.items()}).best()


def rewards() -> list[str]:
    """Names of the rewards that need no file and choose among images by themselves."""
    known = {name: registry.describe("reward", name)["fields"] for name in registry.names("reward")}
    needing = ("path", "reward", "rewards")
    return [
        name
        for name, fields in known.items()
        if name != "votes" and not any(f["name"] in needing and not f["default"] for f in fields)
    ]
