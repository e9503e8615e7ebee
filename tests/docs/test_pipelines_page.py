"""docs/pipelines.md: every exported class has a row or a reason, and the page is its rows'."""

from scripts.site.pipelines import PAGE, classes, read
from scripts.site.pipelines_page import GUIDED, page, served
from tests.classic.table import LEFT_OUT, TINY

ROWS = read()


def test_every_exported_class_has_a_row():
    assert set(classes()) == {*TINY, *LEFT_OUT} == set(ROWS)
    assert not set(TINY) & set(LEFT_OUT) and len(TINY) >= 200


def test_other_pages_name_the_number_of_classes():
    for page_of in ("README.md", "docs/howto/stock_pipelines.md"):
        text = (PAGE.parents[1] / page_of).read_text(encoding="utf-8")
        assert f"{len(TINY)} classes" in text


def test_the_page_is_what_its_rows_say():
    assert PAGE.read_text(encoding="utf-8") == page(ROWS)


def test_every_reason_is_a_sentence():
    for row in ROWS.values():
        for column, good in (("hosted", "yes"), ("guide", GUIDED), ("scheduler", "equal finite")):
            reason = row[column]
            assert reason in good or (reason.endswith(".") and " " in reason), row["class"]


def test_most_classes_are_served():
    tried = [ROWS[name] for name in TINY]
    assert sum(map(served, tried)) >= 165
    assert sum(row["guide"] in GUIDED for row in tried) >= 150
