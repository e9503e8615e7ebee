"""The table of promises names tests that exist."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def functions_of(name):
    path = (HERE if "/" not in name else ROOT) / name
    return {node.name for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)}  # fmt: skip


def test_every_promise_has_tests_that_exist():
    text = (HERE / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "**" not in line][1:]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, test in named:
            assert not test or test in functions_of(file), (file, test)
