"""The table of the page on forecasts is that of its file."""

import csv

from scripts.study.forecast import table
from tests.docs.pages import ROOT, read


def test_the_table_of_forecasts():
    with (ROOT / "docs/figures/forecast.csv").open() as file:
        lines = table(list(csv.DictReader(file)))
    assert len(lines) > 15 and "\n".join(lines) in read("docs/howto/half_the_calls.md")
