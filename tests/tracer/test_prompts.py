"""Prompts out of files: text, JSONL, Parquet, and files that are none of these."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracer.errors import TraceError
from tracer.prompts import Row, distinct, longest_first, read_prompts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, column: str | None = None) -> str:
    """The one line of the error."""
    with pytest.raises(TraceError) as caught:
        read_prompts(path, column)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_has_a_prompt_a_line_and_blank_lines_are_none(tmp_path):
    path = write(tmp_path, "prompts.txt", "calc: 1+1=\r\n\n  two spaces before\u2028and one line\n")
    assert read_prompts(path) == [Row(1, "calc: 1+1="), Row(3, "  two spaces before\u2028and one line")]


def test_other_columns_of_jsonl_are_tags_and_numbers_are_lines(tmp_path):
    lines = '{"prompt": "a b", "group": "one", "n": 3, "ok": true, "list": ["é", 1], "none": null}\n\n{"prompt": "c"}\n'
    assert read_prompts(write(tmp_path, "prompts.jsonl", lines)) == [
        Row(1, "a b", (("group", "one"), ("n", "3"), ("ok", "true"), ("list", '["é", 1]'))), Row(3, "c"),
    ]  # fmt: skip


def test_other_columns_of_parquet_are_tags(tmp_path):
    columns = {
        "question": pa.array(["a", None, "b"]).dictionary_encode(), "day": [datetime.date(2026, 1, 2), None, None],
        "weight": [0.5, None, 2.0],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "prompts.parquet")
    assert read_prompts(tmp_path / "prompts.parquet") == [
        Row(1, "a", (("day", "2026-01-02"), ("weight", "0.5"))), Row(2, ""), Row(3, "b", (("weight", "2.0"),)),
    ]  # fmt: skip


def test_other_columns_of_csv_are_tags_and_numbers_are_lines(tmp_path):
    lines = 'prompt,group,n\r\n"calc: 1,\n2=",one,03\r\n\r\nb,,\r\n"say ""c""",two\r\n'
    path = write(tmp_path, "prompts.CSV", b"\xef\xbb\xbf" + lines.encode())
    assert read_prompts(path) == [
        Row(3, "calc: 1,\n2=", (("group", "one"), ("n", "03"))), Row(5, "b"), Row(6, 'say "c"', (("group", "two"),)),
    ]  # fmt: skip
    assert read_prompts(write(tmp_path, "prompts.tsv", "n\tquestion\n\ta, b\n1\t\n"), "question") == [
        Row(2, "a, b"), Row(3, "", (("n", "1"),)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64())), "column 'n' of "),
        (pa.array([[([1], 1)]], pa.map_(pa.list_(pa.int64()), pa.int64())), "holds what is no tag (unhashable type"),
        (pa.array([1 << 60], pa.timestamp("ms")), "column 'n' of "),
        (pa.array([1 << 60], pa.timestamp("us", "UTC")), "column 'n' of "),
        (pa.array([[(b"k", 1)]], pa.map_(pa.binary(), pa.int64())), "row 1 has a value that is no tag (keys must be"),
    ],
)
def test_a_column_of_parquet_that_python_cannot_hold_is_told_in_one_line(tmp_path, values, told):
    pq.write_table(pa.table({"prompt": ["a"], "n": values}), tmp_path / "prompts.parquet")
    line = refused(tmp_path / "prompts.parquet")
    assert told in line
    assert line.endswith(", or write it as text.")


def test_the_column_may_be_named(tmp_path):
    path = write(tmp_path, "prompts.jsonl", '{"prompt": "a", "other": "b"}')
    assert read_prompts(path) == [Row(1, "a", (("other", "b"),))]
    assert read_prompts(path, "other") == [Row(1, "b", (("prompt", "a"),))]


def test_a_limit_takes_the_first(tmp_path):
    path = write(tmp_path, "prompts.txt", "a\nb\nc\n")
    assert read_prompts(path, limit=2) == [Row(1, "a"), Row(2, "b")]


def test_a_prompt_that_comes_again_keeps_its_first_row():
    rows = [Row(1, "a", (("n", "1"),)), Row(2, "b"), Row(3, "a", (("n", "3"),))]
    assert distinct(rows) == rows[:2]


def test_the_longest_come_first_and_equals_in_the_order_of_the_file():
    assert longest_first([Row(1, "a"), Row(2, "a b c"), Row(3, "b"), Row(4, "")]) == [
        Row(2, "a b c"), Row(1, "a"), Row(3, "b"), Row(4, "")
    ]  # fmt: skip


def test_rows_without_a_prompt_are_failures_of_their_own_and_stop_no_others(tmp_path):
    path = write(tmp_path, "odd.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n{"prompt": null}\n{"n": 1}\n{"prompt": "a"}\n')
    rows = read_prompts(path)
    assert [(row.number, row.prompt) for row in rows] == [(1, "a"), (2, ""), (3, ""), (4, ""), (5, "a")]
    assert rows[1].problem == "the prompt is no text, but '5'; write it as text."
    assert distinct(rows) == rows[:4]
    assert read_prompts(path, limit=1) == rows[:1]


@pytest.mark.parametrize(
    ("name", "content", "column", "told"),
    [
        ("empty.txt", "", None, "empty.txt holds no prompts; give text with a prompt a line, CSV, JSONL or Parquet."),
        ("blank.jsonl", "\n\n", None, "holds no prompts"),
        ("none.txt", None, None, "none.txt cannot be read as text in UTF-8: [Errno 2] No such file"),
        ("binary.txt", b"\xff\xfe\x00", None, "cannot be read as text in UTF-8"),
        ("text.parquet", "no parquet", None, "cannot be read as Parquet"),
        ("cut.jsonl", '{"prompt": "a"}\n{"prompt": ', None, "line 2 is no JSON"),
        ("bomb.jsonl", "[" * 100_000, None, "line 1 is no JSON"),
        ("list.jsonl", '["a"]', None, 'line 1 is no JSON object; give lines as {"prompt": "calc: 36+59="}.'),
        ("two.jsonl", '{"a": "x", "b": "y"}', None, "has no column 'prompt' and 2 columns of text: 'a', 'b'; name one"),
        ("no.jsonl", '{"a": 1}', None, "has no column 'prompt' and no columns of text; name one with --column."),
        ("other.jsonl", '{"a": "x", "b": 1}', "c", "has no column 'c'; it has 'a', 'b'."),
        ("number.jsonl", '{"prompt": 5}\n{"prompt": 12}', None, "column 'prompt' of "),
        ("number.jsonl", '{"prompt": 5}\n{"prompt": 12}', None, "is no text, it holds '5'; name another"),
        ("text.txt", "a\n", "question", "has no column 'question'; it has 'prompt'."),
        (
            "half.jsonl",
            '{"prompt": "a", "n": "\\ud800"}',
            None,
            "row 1 has a value that is no tag ('utf-8' codec can't",
        ),
        (
            "p.json",
            '["a"]',
            None,
            "p.json is JSON, which is not read; give JSONL, one object a line, in a file named *",
        ),
        ("head.csv", "prompt,group\n", None, "holds no prompts"),
        (
            "more.csv",
            "prompt,n\na,1\n\nb,c,2\n",
            None,
            "more.csv line 4 has more fields than the header's 2; put texts",
        ),
        ("twice.csv", "prompt,n,n\na,1,2\n", None, "names a column twice: 'prompt', 'n', 'n'; give each its own name."),
        ("quote.csv", 'prompt\n"a\nb\n', None, "quote.csv cannot be read as CSV in UTF-8: unexpected end of data."),
        ("latin.csv", b"prompt\ncaf\xe9\n", None, "latin.csv cannot be read as CSV in UTF-8"),
        ("two.tsv", "a\tb\nx\ty\n", None, "has no column 'prompt' and 2 columns of text: 'a', 'b'; name one"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, name, content, column, told):
    path = tmp_path / name
    if content is not None:
        write(tmp_path, name, content)
    assert told in refused(path, column)


def test_the_only_column_of_text_is_taken(tmp_path):
    path = write(tmp_path, "prompts.jsonl", '{"question": "a", "n": 1}')
    assert read_prompts(path) == [Row(1, "a", (("n", "1"),))]
