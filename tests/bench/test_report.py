"""README's tables and its figure are made from the results that are committed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))
report = importlib.import_module("report")


def test_every_table_of_readme_is_that_of_its_results():
    text = report.README.read_text()
    assert len(report.MARKER.findall(text)) >= 4
    assert report.with_tables(text) == text


def test_another_number_makes_another_table(monkeypatch):
    def changed(file: str):
        results = json.loads((report.RESULTS / file).read_text())
        if file.startswith("step"):
            results["results"]["TRL DPOTrainer, bf16"]["time_ratio"] = 7.25
        return results

    monkeypatch.setattr(report, "load", changed)
    assert "| TRL DPOTrainer, bf16 | 7.25 |" in report.with_tables(report.README.read_text())


def test_the_first_sentence_has_the_numbers_of_the_step():
    step = next(m.group(2) for m in report.MARKER.finditer(report.README.read_text()) if m.group(2).startswith("step"))
    trl = report.load(step)["results"]["TRL DPOTrainer, bf16"]
    memory = trl["peak_bytes"]["after"] / trl["peak_bytes"]["before"]
    first = " ".join(report.README.read_text().split("![")[0].split())
    assert f"takes {trl['time_ratio']:.2f} of the time and {memory:.2f} of the peak memory" in first


def test_the_figure_shows_them_too(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    step = next(m.group(2) for m in report.MARKER.finditer(report.README.read_text()) if m.group(2).startswith("step"))
    monkeypatch.setattr(report, "FIGURE", tmp_path / "step.svg")
    report.draw(report.load(step))

    def texts(svg: str) -> list[str]:
        return [part.split("</text>")[0].rpartition(">")[2] for part in svg.split("<text")[1:]]

    committed = (BENCH.parent / "docs" / "step.svg").read_text()
    assert texts(committed) == texts((tmp_path / "step.svg").read_text()) and len(texts(committed)) >= 8
