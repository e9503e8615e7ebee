"""The page: a heading, and a tab for each task."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from sampler.ui import pictures
from sampler.ui.generate_form import GenerateForm
from sampler.ui.generate_tab import GenerateTab
from sampler.ui.inspect_tab import InspectTab
from sampler.ui.parts import html
from sampler.ui.studio import Studio
from sampler.ui.votes_tab import VotesTab


def page(studio: Studio, explain: Callable[[BaseException], str]) -> gr.Blocks:
    """Build the page with its event handlers. explain: turns an exception into a sentence."""
    with gr.Blocks(title="sampler", analytics_enabled=False, fill_width=True) as blocks:
        html(pictures.heading(studio.model.label), "head")
        form = GenerateForm(studio)
        generate = GenerateTab(studio, explain, form)
        with gr.Tabs():
            with gr.Tab("Generate"):
                generate.build()
            with gr.Tab("Inspect"):
                InspectTab(studio, explain, form).build()
            with gr.Tab("Votes"):
                VotesTab(studio, explain).build()
        blocks.unload(generate.stop_run)
    return blocks
