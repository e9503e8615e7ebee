"""Numbers in the documentation are those of the committed files that their commands write.

Whole tables are written again and compared. Any other number has its source behind it:

    0.977 <!-- from guidance_study.csv: ssim where point=hold 0.95 /3 -->

A file of docs/figures, a column, and what its one row has (` & ` between several). `, over K=V`
divides by the same column of another row, `, less K=V` subtracts it. A number before ` %` is a
share. The page shows as many digits as it likes.
"""

import csv
import re
import shutil

import pytest

from scripts.bench import batch as bench_batch
from scripts.study import guidance_document as study_guidance_document
from scripts.study import training as study_training
from tests.docs.pages import PAGES, ROOT, blocks, prose, read

FIGURES = ROOT / "docs" / "figures"
MARK = re.compile(
    r"(-?\d[\d,]*(?:\.\d+)?)( ?%)?\s*<!-- from (\S+\.csv): (.+?)"
    r"(?: where (.+?))?(?:, (over|less) (.+?))? -->"
)
# Where every measured number has to be marked. port.md has other people's defaults.
MARKED = ["README.md", "docs/index.md", "docs/command_line.md"]
MARKED += [p for p in PAGES if p.startswith("docs/howto/") and not p.endswith("port.md")]
MEASURED = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)|\d+ ?%")
VERSIONS = re.compile(r"(Python|PyTorch|torch|diffusers|transformers|TRL|Apache-) ?$")


def rows(name):
    text = (FIGURES / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in text if not line.startswith("#")))


def cell(name, column, where):
    wanted = dict(part.split("=", 1) for part in where.split(" & ")) if where else {}
    found = [r for r in rows(name) if all(r[k] == v for k, v in wanted.items())]
    assert len(found) == 1, f"{name} has {len(found)} rows with {where}"
    return float(found[0][column])


def agrees(number, percent, name, column, where, how, other):
    value = cell(name, column, where)
    if how:
        second = cell(name, column, other)
        value = value / second if how == "over" else value - second
    shown = number.replace(",", "")
    digits = len(shown.partition(".")[2])
    value = 100 * value if percent else value
    return abs(value - float(shown)) <= 0.5 * 10**-digits * (1 + 1e-9)


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- from " in read(page)])
def test_marked_numbers_are_those_of_the_files(page):
    text = prose(page)
    marks = list(MARK.finditer(text))
    assert len(marks) == text.count("<!-- from "), "a mark has no number before it"
    for mark in marks:
        assert agrees(*mark.groups()), f"{page}: {mark[0]}"


# Pages whose tables a script writes and another test compares with the file.
# checked by tests/docs/test_forecast_page.py and tests/samplers/test_study.py
WRITTEN_TABLES = ["docs/howto/half_the_calls.md", "docs/howto/calibrate.md"]


@pytest.mark.parametrize("page", MARKED)
def test_no_measured_number_is_without_its_source(page):
    text = MARK.sub("", prose(page))
    if page in WRITTEN_TABLES:
        text = re.sub(r"(?m)^\|.*$", "", text)
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    text = re.sub(r"(?m)`[^`\n]*`|\]\(.*?\)|^#.*$", "", text)
    for found in MEASURED.finditer(text):
        before = text[max(0, found.start() - 20) : found.start()]
        assert VERSIONS.search(before), f"{page}: ...{before}{found[0]}"


def test_a_wrong_number_and_a_wrong_row_are_found_out():
    point = ("guidance_study.csv", "rows", "point=linear_ag", "over", "point=cfg 3")
    assert agrees("0.7", None, *point) and agrees("70", " %", *point)
    assert not agrees("0.71", None, *point) and not agrees("0.8", None, *point)
    with pytest.raises(AssertionError, match="0 rows"):
        agrees("1", None, "guidance_study.csv", "rows", "point=none such", None, None)


def test_the_table_of_reliability(tmp_path, monkeypatch):
    """After a new CSV: `python -m scripts.bench.batch table`."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "reliability.md", tmp_path / "docs")
    monkeypatch.setattr(bench_batch, "ROOT", tmp_path)
    bench_batch.main(["table"])
    assert (tmp_path / "docs" / "reliability.md").read_text() == read("docs/reliability.md")


def test_the_page_of_guidance(tmp_path):
    """After a new CSV: `python -m scripts.study.guidance report`."""
    study_guidance_document.write_documents(tmp_path, FIGURES)
    for page in study_guidance_document.PAGES:
        assert (tmp_path / page).read_text(encoding="utf-8") == read(f"docs/{page}")


def test_the_page_of_the_training_study(tmp_path):
    """After a new CSV: `python -m scripts.study.training page`."""
    (tmp_path / "figures").mkdir()
    for name in ("training_study.csv", "gradient_noise.csv"):
        shutil.copy(FIGURES / name, tmp_path / "figures")
    study_training.page(tmp_path)
    text = (tmp_path / "training_study.md").read_text(encoding="utf-8")
    assert text == read("docs/training_study.md") and text.count("\n") <= 380


def lines_of(page):
    return [re.sub(r" +", " ", line) for line in prose(page).splitlines() if line.startswith("|")]


def test_the_tables_of_kernels():
    lines = lines_of("docs/kernels.md")
    for r in rows("kernels_counts.csv"):
        cells = [r["case"], r["launches"], r["bytes per element"], r["least bytes per element"]]
        cells += [r["eager launches"], r["eager bytes per element"]]
        assert "| " + " | ".join(cells).replace("|  |", "| |") + " |" in lines, r
    for r in rows("host_time.csv"):
        cells = [r["case"], r["ours µs"], r["walked µs"], f"{r['its µs']} ({r['compared with']})"]
        cells += [r["ratio"], r["at most"], {"True": "reached", "False": "missed"}[r["reached"]]]
        assert f"| {' | '.join(cells)} |" in lines, r
    calculated = rows("kernels_roofline.csv")
    for size in {r["size"] for r in calculated}:
        (line,) = [line for line in lines if line.startswith(f"| {size} |")]
        pairs = []
        for case, other in (("CFG + DDIM", "diffusers"), ("APG + DDIM", "diffusers"),
                            ("APG + GHVB", "reference")):  # fmt: skip
            mine = [r for r in calculated if (r["case"], r["size"]) == (case, size)]
            for side in ("ours", other):
                found = [float(r[f"{side} µs"]) for r in mine]
                pairs.append(" / ".join(f"{t:.0f}" if t >= 20 else f"{t}" for t in found))
        assert line == f"| {size} | {' | '.join(pairs)} |"
    for r in rows("arithmetic_share.csv"):
        cells = [r[k] for k in ("network", "latents", "network ms", "arithmetic ms", "share")]
        assert f"| {' | '.join(cells)} |" in lines, r


def test_the_tables_of_fine_tuning():
    lines = lines_of("docs/finetune_study.md")
    curves, mix = rows("finetune_curves.csv"), rows("finetune_mix.csv")
    for reward in ("soft_compressibility", "classifier", "colour_agreement"):
        for trainer in ("alignprop", "ddpo", "rlcm"):
            mine = [r for r in curves if (r["reward"], r["trainer"]) == (reward, trainer)]
            ends = [max((r for r in mine if r["seed"] == s), key=lambda r: int(r["update"]))
                    for s in "012"]  # fmt: skip
            start = next(r for r in mine if r["update"] == "0")
            shown = ", ".join(f"{float(r['value']):.3f}" for r in ends)
            begin = f"| {trainer} | {float(start['value']):.3f} | {shown} | {ends[0]['images']} |"
            assert any(begin in line for line in lines), begin
    for reward in ("soft_compressibility", "classifier"):
        mine = [r for r in mix if (r["reward"], r["trainer"]) == (reward, "alignprop")]
        values = " | ".join(f"{float(r['value']):.3f}" for r in mine)
        assert f"| {reward} | {values} |" in lines
        assert (
            f"| Fréchet | {' | '.join(f'''{float(r['frechet']):.1f}''' for r in mine)} |" in lines
        )


def test_the_sentences_of_fine_tuning():
    """The ranges that the study's text tells are those of its summary."""
    gained = [
        r for r in rows("finetune_summary.csv") if float(r["ddpo_gain"]) > 0 and r["images_share"]
    ]
    shares = [sorted(100 * float(r[k]) for r in gained)
              for k in ("images_share", "cpu_share_alignprop", "cpu_share_rlcm")]  # fmt: skip
    images, own, rlcm = shares
    text = " ".join(read("docs/finetune_study.md").split())
    assert f"after {images[0]:.1f} to {images[-1]:.0f} % of its images" in text
    assert f"{own[0]:.1f} to {own[-1]:.1f} % of its CPU time" in text
    assert len(gained) == 6 and f"after {', '.join(f'{s:.0f}' for s in rlcm[:-1])} and" in text


def test_the_sentence_of_reliability():
    """The share of the network in the time, least and most."""
    shares = []
    for part in ("throughput", "adaptive"):
        found = {r["measure"]: r["value"] for r in rows(f"batch_{part}.csv")}
        alone, rest = (
            [float(v) for v in found[f"{what}, ms per image: stock, ours"].split(", ")]
            for what in ("the network alone", "everything else")
        )
        shares += [100 * a / (a + b) for a, b in zip(alone, rest, strict=True)]
    told = f"The network takes {min(shares):.0f} to {max(shares):.0f} %"
    assert told in " ".join(read("docs/reliability.md").split()), told


def test_commands_beside_numbers_are_scripts_that_exist():
    """`python -m scripts...` in sentences and tables; those in blocks are run by test_blocks.py."""
    for page in PAGES:
        assert not [text for text in blocks(page, "text") if "python -m scripts" in text]
        for script in re.findall(r"`python -m (scripts\.[\w.]+)", read(page)):
            path = ROOT / (script.replace(".", "/") + ".py")
            assert path.is_file(), f"{page}: {script}"
