"""Answers as other programs read them, and what people give to parameters."""

import json

import pyarrow as pa
import pytest

from graphs.answers import csv_text, json_text, jsonl_text, parameter_value, plain

ANSWER = pa.table(
    {
        "word": pa.array(['a "b"', None]),
        "value": pa.array([float("nan"), 0.5]),
        "list": pa.array([[1, 2], None]),
        "tags": pa.array([[("city", "Dallas")], []], pa.map_(pa.string(), pa.string())),
    }
)


def test_csv_holds_lists_and_maps_as_json_and_nothing_for_null():
    assert csv_text(ANSWER).splitlines() == [
        '"word","value","list","tags"',
        '"a ""b""",nan,"[1, 2]","{""city"": ""Dallas""}"',
        ',0.5,,"{}"',
    ]


def test_json_and_jsonl_hold_null_for_what_json_does_not_have():
    expected = [
        {"word": 'a "b"', "value": None, "list": [1, 2], "tags": {"city": "Dallas"}},
        {"word": None, "value": 0.5, "list": None, "tags": {}},
    ]
    assert json.loads(json_text(ANSWER)) == expected
    assert [json.loads(line) for line in jsonl_text(ANSWER).splitlines()] == expected


def test_infinities_become_null_at_any_depth():
    assert plain({"a": [1.0, float("inf")], "b": (float("-inf"), "x")}) == {"a": [1.0, None], "b": [None, "x"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-0.5", -0.5),
        ("true", True),
        ("null", None),
        ("Dallas", "Dallas"),
        ('"3"', "3"),
        ("NaN", "NaN"),
        ("[1]", "[1]"),
        ('{"a": 1}', '{"a": 1}'),
        ("", ""),
    ],
)
def test_a_parameter_is_what_it_reads_as(text, value):
    found = parameter_value(text)
    assert (found, type(found)) == (value, type(value))
