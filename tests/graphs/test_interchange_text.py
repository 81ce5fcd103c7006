"""JSON in pieces: the same as read at once, whatever the pieces; what cannot be read is told in one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import GraphError, interchange_text
from graphs.interchange_text import members

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('abc"\\}],', max_size=3), inner, max_size=3),
    max_leaves=12,
)


def read(path):
    return {
        name: [item for batch in value for item in batch] if name in ("nodes", "links") else value
        for name, value in members(path, ("nodes", "links"))
    }


@settings(max_examples=80, deadline=None)
@given(nodes=st.lists(values, max_size=9), other=values, piece=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_any_piece_size_reads_what_json_reads(tmp_path_factory, nodes, other, piece, indent):
    path = tmp_path_factory.mktemp("pieces") / "x.json"
    document = {"a": other, "nodes": nodes, "b": 12, "links": [1, 2], "c": [other]}
    path.write_text(json.dumps(document, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interchange_text, "PIECE", piece)
        assert read(path) == document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has '' where '\{' belongs, at character 0"),
        ("[]", r"has '\[' where '\{' belongs"),
        ('{"nodes": {}}', r"has '\{' where '\[' belongs"),
        ('{"nodes": [1, 2', "has '' where ',' or ']' belongs"),
        ('{"nodes": [{"a": 1}, {"b"', "is not valid JSON, or cut off"),
        ('{"nodes": [1 2]}', "has '2' where ',' or ']' belongs"),
        ('{"nodes": [1,]}', "is not valid JSON, or cut off"),
        ('{"a": 1, "a": 2}', "has the member 'a' twice"),
        ('{"a": 1} x', "goes on after its end"),
        ('{"a": "\x00"}', "Invalid control character"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "is nested too deeply"),
        ('{"nodes": [' + '{"a":' * 200_000 + "1" + "}" * 200_000 + "]}", "is nested too deeply"),
    ],
)
def test_what_is_no_json_is_told_with_its_place(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(GraphError, match=message) as error:
        read(tmp_path / "bad.json")
    assert str(error.value).startswith("bad.json ")
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(GraphError, match="is not UTF-8 text"):
        read(tmp_path / "bad.json")


@pytest.mark.parametrize("begin", ['{"a": "', '{"nodes": ["', '{"nodes": [{"a": [', '{"'])
def test_a_value_without_end_is_refused_before_it_fills_the_memory(tmp_path, begin, monkeypatch):
    monkeypatch.setattr(interchange_text, "LARGEST", 1 << 16)
    monkeypatch.setattr(interchange_text, "PIECE", 1 << 12)
    path = tmp_path / "long.json"
    path.write_text(begin + "1," * (1 << 19))
    with pytest.raises(GraphError, match="has a value of more than 65,536 characters"):
        read(path)


def test_a_file_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(GraphError, match="No such file"):
        read(tmp_path / "nothing.json")
