"""Parts of each side of the page: strategy picker with its controls, results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sampler import registry
from sampler.core.spacings import NAMES
from sampler.ui import fields, pictures
from sampler.ui.export import short
from sampler.ui.fields import Control
from sampler.ui.form import StrategyChoice

FORMATS = ("Command line", "YAML", "Python")
EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Picker:
    """Dropdown of the strategies of a kind, with the controls of each."""

    name: gr.Dropdown
    controls: Mapping[str, Mapping[str, Any]]

    def components(self) -> set[Any]:
        """All input components."""
        return {self.name, *(c for own in self.controls.values() for c in own.values())}

    def chosen(self, values: Mapping[Any, Any]) -> StrategyChoice:
        """The chosen strategy, from the values of all components."""
        name = values[self.name]
        return StrategyChoice(name, {field: values[c] for field, c in self.controls[name].items()})


@dataclass(frozen=True)
class Results:
    """Components that show one side's run, and the button that saves it."""

    column: gr.Column
    title: gr.HTML
    pictures: gr.HTML
    exports: Mapping[str, gr.Textbox]
    save: gr.Button
    saved: gr.HTML
    run: gr.State
    drafts: gr.HTML
    drafted: gr.Accordion


def picker(
    kind: str, spec: Mapping[str, Any], side: str, own: Mapping[str, Any] | None = None
) -> Picker:
    """Picker of a strategy; spec: the initial choice.

    own: the model's default rule, which rules with a rule of that name inside start with.
    """
    names = registry.names(kind)
    name = gr.Dropdown(
        names, value=spec["name"], label=kind.title(), elem_id=f"{side}-{kind}", interactive=True
    )
    groups, controls = [], {}
    for known in names:
        given = spec if known == spec["name"] else _inside(kind, known, own or {})
        with gr.Column(visible=known == spec["name"], elem_classes="strategy") as group:
            about = registry.describe(kind, known)
            html(pictures.note(about["summary"]))
            controls[known] = _controls(kind, known, given, f"{side}-{kind}")
        groups.append(group)
    name.change(
        lambda chosen: [gr.update(visible=known == chosen) for known in names],
        name,
        groups,
        queue=False,
        **EVENT,
    )
    return Picker(name, controls)


def _inside(kind: str, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Initial values of the rules inside a strategy: the model's own one in place of its name."""
    same = [f for f, rule in fields.inner_rules(kind, name).items() if rule == own.get("name")]
    return {field: short("guidance", own) for field in same}


def grid_picker(side: str, own: Any) -> gr.Dropdown:
    """Dropdown of the grids by name, which also takes numbers; own: that of the configuration."""
    return gr.Dropdown(
        [("the model's own", ""), *((name, name) for name in NAMES)],
        value=own if isinstance(own, str) else "",
        label="Grid of noise levels",
        elem_id=f"{side}-grid",
        allow_custom_value=True,
        interactive=True,
    )


def results(side: str, visible: bool) -> Results:
    """Result components of one side."""
    with gr.Column(visible=visible, min_width=300, elem_id=f"{side}-results") as column:
        title = html(pictures.title(side, ""))
        shown = html(pictures.placeholder(), f"{side}-pictures")
        save = gr.Button(
            "Save as a run folder", size="sm", interactive=False, elem_id=f"{side}-save"
        )
        saved = html("", f"{side}-saved")
        with gr.Accordion(
            "Drafts, best first", visible=False, elem_id=f"{side}-drafted"
        ) as drafted:
            drafts = html("", f"{side}-drafts")
        exports = {}
        with gr.Accordion("Copy as", open=False, elem_id=f"{side}-copy"), gr.Tabs():
            for form in FORMATS:
                with gr.Tab(form):
                    exports[form] = gr.Textbox(
                        label=form,  # gradio hides the copy button with the label
                        lines=4,
                        max_lines=30,
                        buttons=["copy"],
                        interactive=False,
                        elem_id=f"{side}-{form.split()[0].lower()}",
                        elem_classes="copied",
                    )
    return Results(column, title, shown, exports, save, saved, gr.State(None), drafts, drafted)


def number_or_none(value: Any, placeholder: str, **options: Any) -> gr.Textbox:
    """Text box of a number that may be empty: gradio's Number makes 0 of an empty one."""
    text = "" if value is None else str(value)
    return gr.Textbox(text, placeholder=placeholder, lines=1, max_lines=1, **options)


def html(text: str, ident: str | None = None) -> gr.HTML:
    """HTML component without gradio's typography."""
    return gr.HTML(text, elem_id=ident, apply_default_css=False)


def _controls(kind: str, name: str, given: Mapping[str, Any] | None, prefix: str) -> dict[str, Any]:
    """One component per field: required ones first, others in an accordion."""
    found = {}
    known = fields.controls(kind, name, given)
    plain = [c for c in known if not c.optional and c.form != "yaml"]
    if plain:
        with gr.Row(elem_classes="controls"):
            found |= {c.name: component(c, f"{prefix}-{name}-{c.name}") for c in plain}
    if rest := [c for c in known if c not in plain]:
        with gr.Accordion("Further fields", open=not plain), gr.Row(elem_classes="controls"):
            found |= {c.name: component(c, f"{prefix}-{name}-{c.name}") for c in rest}
    return {c.name: found[c.name] for c in known}


def component(control: Control, ident: str) -> Any:
    """gradio component of a control."""
    common: dict[str, Any] = {
        "label": control.name,
        "info": control.hint or None,
        "elem_id": ident,
        "interactive": True,
    }
    if control.form in ("number", "integer"):
        if control.optional:
            return number_or_none(control.shown, "not set", **common)
        return gr.Number(control.shown, **common)
    if control.form == "flag":
        return gr.Checkbox(bool(control.shown), **common)
    if control.form == "rule":
        return gr.Dropdown(
            list(control.choices), value=control.shown, allow_custom_value=True, **common
        )
    if control.form == "choice":
        choices = [(str(c), c) for c in control.choices]
        choices += [("not set", None)] if control.optional else []
        return gr.Dropdown(choices, value=control.shown, **common)
    return gr.Textbox(control.shown or "", placeholder="not set", lines=1, **common)
