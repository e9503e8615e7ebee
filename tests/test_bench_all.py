"""docs/performance.md holds what the committed CSV files hold; the benchmark runs."""

import pytest

from scripts.bench import all as bench_all
from tests.families import FAMILIES


def test_the_page_is_written_from_the_committed_files():
    """After a new CSV: `python -m scripts.bench.all document`."""
    page = bench_all.ROOT / "docs" / "performance.md"
    assert page.read_text(encoding="utf-8") == bench_all.document()


def test_every_family_has_its_figure():
    assert [row["family"] for row in bench_all.read("families_overhead.csv")] == list(FAMILIES)


def test_a_family_is_measured(monkeypatch):
    import tests.families

    monkeypatch.setattr(bench_all, "SHORT", 1)
    monkeypatch.setattr(bench_all, "LONG", 3)
    few = {name: FAMILIES[name] for name in ("Sana", "DiT")}
    monkeypatch.setattr(tests.families, "FAMILIES", few)
    rows = list(bench_all.families(1))
    assert [row["family"] for row in rows] == ["Sana", "DiT"]
    assert all({"engine ms", "stock ms", "machine", "versions"} <= set(row) for row in rows)


def test_comments_in_files_are_left_out():
    rows = bench_all.read("kernels_counts.csv")
    assert rows and all("case" in row for row in rows)
    with pytest.raises(FileNotFoundError):
        bench_all.read("none.csv")
