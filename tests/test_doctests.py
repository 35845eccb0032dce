"""The examples in docstrings: each is run, and its output compared."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import invflow

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("invflow", "operators/invflow_operators", "problems/invflow_problems")
#: base classes, of which the subclasses have examples, and what solvers and ``compare`` return
WITHOUT_EXAMPLE = {"Comparison", "NFE", "Reward", "Solver"}


def modules_with_examples() -> list[str]:
    """Dotted names, found by the text of the files: nothing is imported to list them."""
    found = []
    for folder in FOLDERS:
        base = (ROOT / folder).parent
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                parts = file.relative_to(base).with_suffix("").parts
                found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.fixture(autouse=True)
def _quiet_place(tmp_path, monkeypatch):
    """An empty folder, no window for figures, no way to the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_a_module(name):
    module = importlib.import_module(name)
    tests = [t for t in doctest.DocTestFinder(exclude_empty=True).find(module) if t.examples]
    assert tests, f"{name} has '>>> ' in its text, but no example that doctest finds"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append, clear_globs=True)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", sorted(set(invflow._NAMES) - WITHOUT_EXAMPLE))
def test_public_names_have_an_example(name):
    assert ">>> " in (inspect.getdoc(getattr(invflow, name)) or ""), f"invflow.{name} shows no example"
