"""Map the fields of a registered strategy to form controls, and their values back to a spec.

Independent of gradio; `sampler.ui.parts` draws the controls.

    number, integer    a number          flag      a box to tick
    choice             one of several    text      any text
    rule               a guidance rule: one by its name, or YAML with its fields
    yaml               anything else: lists, operators with their fields
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sampler import registry
from sampler.config import yaml as strict_yaml
from sampler.ui.export import as_int, as_number, yaml_scalar

Form = Literal["number", "integer", "flag", "choice", "text", "rule", "yaml"]
YAML = ("rule", "yaml")  # forms whose controls hold YAML
_PLAIN: dict[Any, Form] = {bool: "flag", int: "integer", float: "number", str: "text"}
_MAX_HINT = 100  # characters


@dataclass(frozen=True)
class Control:
    """Control of a field. optional: may be empty; shown: initial value."""

    name: str
    form: Form
    shown: Any = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    hint: str = ""


def controls(kind: str, name: str, given: Mapping[str, Any] | None = None) -> list[Control]:
    """Controls of a strategy's fields; `given` replaces the fields' defaults as initial values."""
    hints = get_type_hints(registry.lookup(kind, name))
    about = registry.describe(kind, name)
    explained = explanations(about["doc"])
    found = []
    for field in about["fields"]:
        form, choices, optional = form_of(hints[field["name"]])
        if field["name"] in inner_rules(kind, name):
            form, choices, optional = "rule", tuple(registry.names("guidance")), False
        value = (given or {}).get(field["name"], field["default"])
        shown = ("" if value is None else yaml_scalar(value)) if form in YAML else value
        parts = (explained.get(field["name"], ""), field["range"])
        hint = "; ".join(part for part in parts if part)
        found.append(Control(field["name"], form, shown, choices, optional, hint))
    return found


def inner_rules(kind: str, name: str) -> dict[str, str]:
    """{field: name of the default} of the fields of a strategy that hold one guidance rule."""
    return {
        f.name: f.default
        for f in dataclass_fields(registry.lookup(kind, name))
        if f.metadata.get("kind") == "guidance" and isinstance(f.default, str)
    }


def spec(kind: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Spec {"name": ..., field: ...} of the controls' values, without fields at their defaults.

    Raises ValueError for a control that must not be empty, and UsageError for invalid YAML.
    """
    defaults = {f["name"]: f["default"] for f in registry.describe(kind, name)["fields"]}
    found: dict[str, Any] = {"name": name}
    for control in controls(kind, name):
        if control.name not in values:
            continue
        value = _value(kind, name, control, values[control.name], defaults[control.name])
        if value != _listed(defaults[control.name]):
            found[control.name] = value
    return found


def explanations(doc: str) -> dict[str, str]:
    """{field: first sentence} from a docstring with indented lines `field, field: text`."""
    found: dict[str, str] = {}
    for match in re.finditer(r"^ {4}(\w+(?:, \w+)*): (.+(?:\n {8,}.+)*)", doc, re.MULTILINE):
        # a semicolon in brackets, as in [u; c], ends no sentence
        text = re.split(r"(?<=[^.\d])\. |; (?![^\[(]*[])])", " ".join(match[2].split()))[0]
        text = text.rstrip(".")
        if len(text) <= _MAX_HINT:
            found |= dict.fromkeys(match[1].split(", "), text)
    return found


def form_of(hint: Any) -> tuple[Form, tuple[Any, ...], bool]:
    """(form, choices, optional) of a field's type."""
    members = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
    optional = type(None) in get_args(hint)
    if len(members) > 1:
        return "yaml", (), optional
    if get_origin(members[0]) is Literal:
        return "choice", get_args(members[0]), optional
    return _PLAIN.get(members[0], "yaml"), (), optional or members[0] is Any


def _value(kind: str, name: str, control: Control, value: Any, default: Any) -> Any:
    empty = value is None or (isinstance(value, str) and not value.strip())
    if empty and (control.optional or default is None):
        return None
    if empty:
        shown = yaml_scalar(default)
        raise ValueError(
            f"{kind} {name!r}: field {control.name!r} is empty; its default is {shown}."
        )
    if control.form in YAML:
        return strict_yaml.parse(str(value), f"{kind}.{control.name}")[0]
    return as_number(value) if control.form in ("number", "integer") else as_int(value)


def _listed(value: Any) -> Any:
    """A default with tuples as lists, as YAML has them."""
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
