"""Docstrings begin with a verb or a noun."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("sampler", "kernels", "scripts", "tests", "docs")
QUESTIONS = {"What", "Whether", "How", "Where", "When", "Which", "Who", "Whose", "Why"}


def docstrings(source):
    """(line, docstring) of every module, class and function of a source."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def questions(source):
    return [line for line, text in docstrings(source) if text.split()[0].strip(",.:") in QUESTIONS]


def test_no_docstring_begins_with_a_question_word():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in questions(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_the_check_sees_a_question_word():
    assert questions('def f():\n    """Whether it fits."""\n') == [1]
    assert questions('def f():\n    """Return whether it fits."""\n') == []
