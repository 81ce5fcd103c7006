"""Tables in a terminal, as wide as that is."""

import sys

import pyarrow as pa
import pytest

from tracer.tables import table_text


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")


def test_few_columns_stand_side_by_side(terminal):
    text = table_text(pa.table({"word": ["Dallas"], "n": [3]}))
    assert "Dallas" in text.splitlines()[-1]
    assert text.splitlines()[-1].endswith("3")


def test_of_more_columns_than_fit_each_value_has_a_line(terminal):
    rows = pa.table({f"column {number}": ["a", "b"] for number in range(10)})
    lines = table_text(rows).splitlines()
    assert lines[:3] == ["━━ row 1 ━━", "column 0  a", "column 1  a"]
    assert lines[11:13] == ["━━ row 2 ━━", "column 0  b"]
    assert len(lines) == 22
