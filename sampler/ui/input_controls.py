"""Controls of what the pipeline's call takes beside the prompt: images, strength, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from sampler.config.tasks import start_settings
from sampler.ui.inputs import Takes
from sampler.ui.parts import component

LABELS = {
    "image": "Image",
    "mask_image": "Mask: white is painted anew",
    "control_image": "Control image",
    "ip_adapter_image": "Image prompt",
}


class InputControls:
    """Components of the inputs of a call, built where it stands in the form."""

    def __init__(self, takes: Takes) -> None:
        self.takes = takes
        self.components: dict[str, Any] = {}
        if takes.images:
            start = not any(takes.images.values()) and "control_image" not in takes.images
            title = "Start from an image" if start else "Images"
            with gr.Accordion(title, open=not start, elem_id="start"):
                self._images()
        if takes.settings:
            with gr.Accordion(f"Settings of {takes.name}", open=False, elem_id="settings"):
                with gr.Row(elem_classes="controls"):
                    for control in takes.settings:
                        ident = f"input-{control.name}"
                        self.components[control.name] = component(control, ident)

    def _images(self) -> None:
        with gr.Row():
            for name, needed in self.takes.images.items():
                label = LABELS.get(name, name.replace("_", " ").capitalize())
                label += " (needed)" if needed else ""
                if name == "video":
                    self.components[name] = gr.File(label=label, elem_id=name, type="filepath")
                    continue
                self.components[name] = gr.Image(
                    label=label, type="filepath", sources=["upload", "clipboard"], height=220,
                    min_width=150, elem_id=name,
                )  # fmt: skip
        if self.takes.strength is not None:
            self.components["strength"] = gr.Slider(
                0.05, 1, self.takes.strength, step=0.05, label="Strength: how much is changed",
                elem_id="strength",
            )  # fmt: skip

    def given(self, values: Mapping[Any, Any], kept: Callable[[str], str]) -> dict[str, Any]:
        """Inputs of the call; kept: stores an uploaded file. Raises UsageError for wrong files."""
        found = self.takes.given({name: values[c] for name, c in self.components.items()})
        if "image" in found and "mask_image" in found:
            start_settings(found["image"], found["mask_image"], None, None)  # sizes agree
        files = {name: kept(found[name]) for name in self.takes.images if name in found}
        return {**found, **files}
