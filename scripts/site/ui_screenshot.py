"""Screenshot of the playground for docs/playground.md, taken in headless Chromium.

python -m scripts.site.ui_screenshot [--out docs/figures/ui.png] [--width 1400] [--chromium FILE]

Needs the extra 'ui', playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sampler
from sampler.config.model import ModelConfig
from sampler.ui.server import served
from sampler.ui.studio import Studio

PROMPTS = "a fox on a green background\na robot on an orange background"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/ui.png"))
    parser.add_argument("--width", type=int, default=1400)
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    parser.add_argument("--chromium", default=found)
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as home, sync_playwright() as driver:
        studio = Studio(sampler.load(), ModelConfig(), Path(home) / "runs", Path(home))
        with served(studio, 0, str) as address:
            browser = driver.chromium.launch(
                executable_path=options.chromium, args=["--no-sandbox"]
            )
            page = browser.new_page(
                viewport={"width": options.width, "height": 1000}, color_scheme="light"
            )
            page.goto(address)
            drive(page)
            page.screenshot(path=options.out, full_page=True)
            browser.close()


def drive(page: Any) -> None:
    """Two prompts, plain guidance against APG at the same high scale, and the stock pipeline."""
    page.locator("#prompts textarea").fill(PROMPTS)
    page.locator("#seed :is(input, textarea)").fill("10")
    page.locator("#compare input").check()
    page.locator("#stock input").check()
    page.locator("#stock-scale input").fill("15")
    for side, rule, scale in (("A", "cfg", "15"), ("B", "apg", "15")):
        page.get_by_role("tab", name=f"Setting {side}").click()
        page.locator(f"#{side}-guidance-{rule}-scale input").fill(scale)
    page.get_by_role("tab", name="Setting A").click()
    page.locator("#generate").click()
    page.locator("#stock-pictures figure.made").first.wait_for(timeout=240_000)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")  # the buttons are at their place
    page.wait_for_timeout(1000)  # the last transitions of the page


if __name__ == "__main__":
    main()
