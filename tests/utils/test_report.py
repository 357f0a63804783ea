"""utils/report.py: what records and tables are made of."""

import torch

from utils import report


def test_stopwatch_reads_time_and_memory():
    readings = report.Stopwatch(torch.device("cpu")).readings()
    assert readings["seconds"] >= 0
    assert readings["peak_memory_gib"] == readings["peak_host_memory_gib"] > 0.01


def test_versions_are_those_that_are_imported():
    assert report.versions()["torch"] == torch.__version__
    assert "python" in report.versions()


def test_markdown_table():
    table = report.markdown_table(["model", "ppl"], [["dense", 21.97123], ["m", 34]])
    assert table.splitlines() == ["| model | ppl |", "| --- | --- |", "| dense | 21.97 |", "| m | 34 |"]
