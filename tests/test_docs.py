"""The documentation is executed, and says what it must."""

from __future__ import annotations

import doctest
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastloss.benchmarks import readme as readme_block

import fastloss

ROOT = Path(__file__).parent.parent
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
PUBLIC = {name: getattr(fastloss, name) for name in fastloss.__all__}
LOSSES = [
    name for name, value in PUBLIC.items() if inspect.isfunction(value) and name not in ("backends", "use_backend")
]


def run(name: str, text: str) -> int:
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "fastloss": fastloss}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    results = doctest.DocTestRunner(optionflags=OPTIONS).run(test)
    assert results.failed == 0
    return results.attempted


def test_readme_runs() -> None:
    assert run("README.md", (ROOT / "README.md").read_text()) >= 10


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if inspect.isfunction(v) or inspect.isclass(v)])
def test_docstring_runs(name: str) -> None:
    docstring = inspect.getdoc(PUBLIC[name])
    assert docstring, f"{name} has no docstring"
    assert (run(name, docstring) > 0) == (">>>" in docstring)


@pytest.mark.parametrize("name", LOSSES)
def test_docstring_of_a_loss_is_a_contract(name: str) -> None:
    docstring = inspect.getdoc(PUBLIC[name]) or ""
    sections = [".. math::", "Args:", "Returns:", "Raises:", "Memory", "eterminism", "Source:", "Example:"]
    assert [s for s in sections if s not in docstring] == []
    arguments = docstring.split("Args:")[1].split("Returns:")[0]
    for parameter in inspect.signature(PUBLIC[name]).parameters:
        assert f"{parameter}:" in arguments, f"{name}: `{parameter}` is not documented"


@pytest.mark.parametrize("name", LOSSES)
def test_reference_has_the_same_signature(name: str) -> None:
    ours = inspect.signature(PUBLIC[name]).parameters
    reference = inspect.signature(getattr(fastloss.reference, name)).parameters
    assert [p for p in ours if p not in ("group", "schedule", "class_group")] == list(reference)
    for parameter in reference.values():
        assert parameter.default == ours[parameter.name].default
        assert parameter.kind == ours[parameter.name].kind


def test_numbers_in_the_readme_come_from_the_results_files() -> None:
    readme = (ROOT / "README.md").read_text()
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    assert all(report["machine"]["git"]["dirty"] is False for report in results)
    assert readme == readme_block.insert(readme, readme_block.block())
