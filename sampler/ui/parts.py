"""Parts that the page has twice: the choice of a strategy with its controls, a side's results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from sampler import registry
from sampler.ui import fields, pictures
from sampler.ui.fields import Control
from sampler.ui.form import Chosen

FORMATS = ("Command line", "YAML", "Python")


@dataclass(frozen=True)
class Picker:
    """A choice among the strategies of a kind, with the controls of each of them."""

    name: gr.Dropdown
    controls: Mapping[str, Mapping[str, Any]]

    def components(self) -> set[Any]:
        """Everything whose value decides."""
        return {self.name, *(c for own in self.controls.values() for c in own.values())}

    def chosen(self, values: Mapping[Any, Any]) -> Chosen:
        """What is chosen, from the values of all components."""
        name = values[self.name]
        return Chosen(name, {field: values[c] for field, c in self.controls[name].items()})


@dataclass(frozen=True)
class Results:
    """What one side shows of its run, and the button that keeps it."""

    column: gr.Column
    title: gr.HTML
    pictures: gr.HTML
    texts: Mapping[str, gr.Textbox]
    keep: gr.Button
    kept: gr.HTML
    made: gr.State


def picker(kind: str, spec: Mapping[str, Any], side: str) -> Picker:
    """The choice of a strategy; `spec` is the one that is shown first."""
    names = registry.names(kind)
    name = gr.Dropdown(
        names, value=spec["name"], label=kind.title(), elem_id=f"{side}-{kind}", interactive=True
    )
    groups, controls = [], {}
    for known in names:
        given = spec if known == spec["name"] else None
        with gr.Column(visible=known == spec["name"], elem_classes="strategy") as group:
            about = registry.describe(kind, known)
            html(f'<p class="note">{escape(about["summary"])}</p>')
            controls[known] = _controls(kind, known, given, f"{side}-{kind}")
        groups.append(group)
    name.change(
        lambda chosen: [gr.update(visible=known == chosen) for known in names],
        name,
        groups,
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )
    return Picker(name, controls)


def results(side: str, visible: bool) -> Results:
    """The place of a side's pictures."""
    with gr.Column(visible=visible, min_width=300) as column:
        title = html(pictures.title(side, ""))
        shown = html(pictures.nothing(), f"{side}-pictures")
        keep = gr.Button(
            "Save as a run folder", size="sm", interactive=False, elem_id=f"{side}-keep"
        )
        kept = html("", f"{side}-kept")
        texts = {}
        with gr.Accordion("Copy as", open=False, elem_id=f"{side}-copy"), gr.Tabs():
            for form in FORMATS:
                with gr.Tab(form):
                    texts[form] = gr.Textbox(
                        label=form,
                        show_label=False,
                        lines=4,
                        max_lines=30,
                        buttons=["copy"],
                        interactive=False,
                        elem_id=f"{side}-{form.split()[0].lower()}",
                        elem_classes="copied",
                    )
    return Results(column, title, shown, texts, keep, kept, gr.State(None))


def html(text: str, ident: str | None = None) -> gr.HTML:
    """HTML as it is, without gradio's typography."""
    return gr.HTML(text, elem_id=ident, apply_default_css=False)


def _controls(kind: str, name: str, given: Mapping[str, Any] | None, prefix: str) -> dict[str, Any]:
    """A component per field: those that must hold something first, others folded away."""
    found = {}
    known = fields.controls(kind, name, given)
    plain = [c for c in known if not c.optional and c.form != "yaml"]
    if plain:
        with gr.Row(elem_classes="controls"):
            found |= {c.name: _component(c, f"{prefix}-{name}-{c.name}") for c in plain}
    if rest := [c for c in known if c not in plain]:
        with gr.Accordion("Further fields", open=not plain), gr.Row(elem_classes="controls"):
            found |= {c.name: _component(c, f"{prefix}-{name}-{c.name}") for c in rest}
    return {c.name: found[c.name] for c in known}


def _component(control: Control, ident: str) -> Any:
    """What draws a control."""
    common: dict[str, Any] = {
        "label": control.name,
        "info": control.hint or None,
        "elem_id": ident,
        "interactive": True,
    }
    if control.form in ("number", "integer"):
        empty = "not set" if control.optional else None
        return gr.Number(control.shown, placeholder=empty, **common)
    if control.form == "flag":
        return gr.Checkbox(bool(control.shown), **common)
    if control.form == "choice":
        choices = [(str(c), c) for c in control.choices]
        choices += [("not set", None)] if control.optional else []
        return gr.Dropdown(choices, value=control.shown, **common)
    return gr.Textbox(control.shown or "", placeholder="not set", lines=1, **common)
