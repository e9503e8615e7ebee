"""The playground in a browser: headless Chromium uses the page as a person would.

Skipped where gradio, playwright or Chromium is missing.
"""

import shlex
import shutil
import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
import torch

import sampler
from sampler.cli import main
from sampler.cli.report import Report
from sampler.cli.ui import explainer
from sampler.config.model import ModelConfig
from sampler.core.errors import SamplerError
from sampler.rewards.ballots import read_votes, write_ballot
from sampler.ui.studio import Studio
from tests.guidance.stock_hosted import picture

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome")
     if (path := shutil.which(name))), None
)  # fmt: skip
WAIT = 120_000  # milliseconds; a loaded machine is slow, and nothing waits in vain


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    return Studio(sampler.load(), ModelConfig(), place / "runs", place)


@pytest.fixture(scope="module")
def server():
    """The module, imported late: gradio takes seconds, in every process of the suite."""
    pytest.importorskip("gradio")
    from sampler.ui import server

    return server


@pytest.fixture(scope="module")
def address(studio, server):
    with server.served(studio, 0, explainer(Report())) as found:
        yield found


@pytest.fixture(scope="module")
def page(address):
    """The open page, and the addresses that it asked for."""
    driver = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(WAIT)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        yield page
        browser.close()


def fill(page, **values):
    for ident, value in values.items():
        page.locator(f"#{ident.replace('__', '-')} :is(input, textarea)").first.fill(str(value))


def generate(page):
    page.locator("#generate").click()


def test_it_listens_on_the_loopback_address_and_to_its_own_names_only(address, server, capsys):
    port = urlsplit(address).port
    with socket.create_connection((server.HOST, port), timeout=5) as there:
        assert there.getpeername()[0] == "127.0.0.1"
    others = [
        entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)
    ]
    for other in [*others, "127.0.0.2"]:
        if other != server.HOST:
            with pytest.raises(OSError):
                socket.create_connection((other, port), timeout=5)
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=30)


def test_a_port_that_is_taken_is_a_sentence(address, server, studio):
    with pytest.raises(SamplerError, match="is in use; choose another with --port"):
        with server.served(studio, urlsplit(address).port, str):
            pass


def compare(page):
    """Make an image of each of two settings."""
    fill(page, prompts="a fox on a green background", steps=4, seed=7)
    page.locator("#compare input").check()
    page.get_by_role("tab", name="Setting B").click()
    fill(page, **{"B__guidance__apg__scale": 6, "B__grid": "beta"})
    page.locator("#B-grid input").press("Enter")
    generate(page)
    page.locator("#B-pictures figure.made").wait_for()


def test_generate_compare_save_and_copy(page, studio, tmp_path):
    page.reload()
    compare(page)
    assert page.locator("#A-pictures figure.made").count() == 1
    for side in "AB":
        caption = page.locator(f"#{side}-pictures figcaption").inner_text()
        assert "8 NFE · " in caption and " s per image" in caption and "seed 7" in caption
        natural = page.locator(f"#{side}-pictures img").evaluate(
            "i => i.decode().then(() => i.naturalWidth)"
        )
        assert natural == 64
        page.locator(f"#{side}-save").click()
        page.locator(f"#{side}-saved p").wait_for()
    runs = sorted(studio.out.iterdir())
    assert len(runs) == 2 and all(main(["verify", str(run), "-q"]) == 0 for run in runs)
    page.locator("#B-copy").get_by_text("Copy as").click()
    page.locator("#B-command").get_by_role("button", name="copy").wait_for()
    line = page.locator("#B-command textarea").input_value()
    assert "--guidance apg --set guidance.scale=6" in line and "--grid beta" in line
    assert main([*shlex.split(line)[1:], "-q", "-o", str(tmp_path / "again")]) == 0
    made = [path.read_bytes() for path in (tmp_path / "again" / "images").iterdir()]
    kept = [path.read_bytes() for run in runs for path in (run / "images").iterdir()]
    assert len(kept) == 2 and kept[0] != kept[1] and kept.count(made[0]) == 1


def test_images_of_other_settings_are_marked_until_they_are_made_again(page):
    page.reload()
    compare(page)
    marked = {side: page.locator(f"body.stale-{side}") for side in "AB"}
    assert marked["A"].count() == marked["B"].count() == 0
    page.locator("#B-guidance-apg-scale input").press("ArrowUp")
    marked["B"].wait_for(state="attached")
    assert marked["A"].count() == 0
    page.locator("#prompts textarea").press_sequentially("s")  # fill() is no input event to gradio
    marked["A"].wait_for(state="attached")
    for side in "AB":
        opacity = page.locator(f"#{side}-pictures img").evaluate("i => getComputedStyle(i).opacity")
        assert float(opacity) < 1
    fill(page, steps=0)
    generate(page)
    page.locator("#problem p").wait_for()
    assert marked["A"].count() == 1, "nothing was made, so the old images are still there"
    fill(page, steps=4)
    generate(page)
    for side in "AB":
        marked[side].wait_for(state="detached")
        page.locator(f"#{side}-pictures figure.made").wait_for()
        assert marked[side].count() == 0
    assert page.locator("#B-results .title").inner_text() == "B ddim, apg 7, beta"


def test_wrong_input_is_the_sentence_of_the_command_line(page, capsys):
    page.locator("#compare input").uncheck()
    fill(page, steps=0, prompts="a fox")
    generate(page)
    told = page.locator("#problem p")
    told.wait_for()
    assert main(["generate", "a fox", "--steps", "0"]) == 2
    assert capsys.readouterr().err == f"sampler: {told.inner_text()}\n"
    fill(page, steps=4)
    generate(page)
    told.wait_for(state="detached")
    page.locator("#A-pictures figure.made").wait_for()


def test_a_run_can_be_stopped(page, monkeypatch):
    # The page of a busy machine falls behind previews that come faster than it draws them.
    monkeypatch.setattr("sampler.ui.previews.PREVIEW_SECONDS", 5.0)
    fill(page, steps=900)
    generate(page)
    page.locator("#A-pictures img[alt=preview]").first.wait_for()  # and was looked at on the way
    page.locator("#stop").click()
    page.locator("#A-pictures").get_by_text("Stopped.").wait_for()


def test_an_image_to_start_from(page, studio, tmp_path):
    picture(size=(64, 64)).save(tmp_path / "start.png")
    page.locator("#start").get_by_text("Start from an image").click()
    page.locator("#image input[type=file]").set_input_files(str(tmp_path / "start.png"))
    page.locator("#image img").wait_for()
    fill(page, strength="0.5", steps=4, seed=7, prompts="a fox on a green background")
    page.locator("#strength input[type=number]").press("Enter")
    page.locator("#compare input").uncheck()
    generate(page)
    page.locator("#A-pictures figure.made").get_by_text("4 NFE · ").wait_for()
    page.locator("#A-copy").get_by_text("Copy as").click()
    line = page.locator("#A-command textarea").input_value()
    (kept,) = (studio.out / "inputs").iterdir()
    assert f"--input image={kept}" in line and "--input strength=0.5" in line
    assert main([*shlex.split(line)[1:], "-q", "-o", str(tmp_path / "again")]) == 0


def test_the_best_of_several_and_the_stock_pipeline(page):
    page.reload()
    fill(page, prompts="a fox", steps=3, seed=4)
    page.locator("#best").get_by_text("Best of N").first.click()
    fill(page, best__count=3, best__steps=2)
    page.locator("#stock input").check()
    generate(page)
    page.locator("#stock-pictures figure.made").wait_for()
    page.locator("#report").get_by_text("SSIM to stock").wait_for()
    assert page.locator("#A-drafts figure.made").count() == 3
    assert page.locator("#A-drafts figure.chosen").count() == 1
    assert "score" in page.locator("#A-pictures figcaption").inner_text()
    rows = page.locator("#report tbody tr").all_inner_texts()
    names = [row.split("\t")[0].strip() for row in rows]
    assert names[:2] == ["A ddim, cfg 3, drafts", "A ddim, cfg 3"] and names[2].startswith("stock")
    assert [row.split("\t")[3].strip() for row in rows] == ["12", "6", "6"]  # evaluations in all


def test_an_optional_number_that_was_seen_stays_empty(page):
    page.reload()
    fill(page, prompts="a fox", steps=3)
    page.locator("#form").get_by_text("Size", exact=True).click()
    page.locator("#width :is(input, textarea)").wait_for()
    assert page.locator("#width :is(input, textarea)").input_value() == ""
    generate(page)
    page.locator("#A-pictures figure.made").wait_for()
    assert page.locator("#problem p").count() == 0


def test_maps_of_words(page):
    page.reload()
    fill(page, prompts="a fox", steps=3)
    page.get_by_role("tab", name="Inspect").click()
    fill(page, words="fox")
    page.locator("#draw").click()
    page.locator("#maps img").nth(1).wait_for()
    page.locator("#regions").get_by_text("peak").first.wait_for()
    fill(page, words="dragon")
    page.locator("#draw").click()
    page.locator("#inspect-problem p").get_by_text("dragon").wait_for()


def test_votes_are_written_as_the_command_does(page, studio):
    run = studio.out / "tuned"
    write_ballot(run / "votes" / "000001", "binary", torch.rand(2, 3, 32, 32), ["a fox", "a dog"])
    page.get_by_role("tab", name="Votes").click()
    page.locator("#votes-run input").fill(str(run))
    page.locator("#votes-run input").press("Enter")
    page.locator("#votes-look").click()
    page.locator("#votes-save").wait_for()
    page.get_by_label("good").nth(1).check()
    page.locator("#votes-save").click()
    page.locator("#votes-note").get_by_text("looking again").wait_for()
    assert [*read_votes(run / "votes" / "000001")] == [{"row": 1, "vote": 1}]
    page.get_by_role("tab", name="Generate").click()


def test_a_narrow_page_goes_to_the_images(page):
    page.set_viewport_size({"width": 420, "height": 900})
    page.evaluate("scrollTo(0, 0)")
    generate(page)
    page.wait_for_function(
        "Math.abs(document.getElementById('results').getBoundingClientRect().y) < 9"
    )
    page.locator("#A-pictures figure.made").wait_for()


def test_the_page_fits_and_asks_nobody_else(page, address):
    for width in (1400, 420):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("scrollTo(0, 0)")
        button = page.locator("#generate").bounding_box()
        assert 600 < button["y"] < 900, "within reach, wherever the form is scrolled to"
    assert page.asked
    hosts = {urlsplit(url).netloc for url in page.asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).netloc}
