"""Text to train on: every kind of file holds the same documents, and what is no text is named."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tracer.conftest import tiny_llama, tiny_tokenizer
from tests.transcoders.test_train import SMALL
from transcoders import TranscoderError, train
from transcoders.corpus import open_corpus, pack, tokens_corpus


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.jsonl", "\n\n", "holds no text"),
        ("broken.jsonl", '{"text": "a"}\n{"text"', "line 2 is no JSON"),
        ("other.jsonl", '{"body": "a"}\n', "line 1 has no 'text'"),
        ("number.jsonl", '{"text": 3}\n', "holds int; expected text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "expected UTF-8 text"),
        ("fake.parquet", "no parquet", "cannot be read"),
        ("picture.png", "x", "of no known kind"),
    ],
)
def test_wrong_data_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TranscoderError, match=message) as error:
        train(tiny_llama(0), tiny_tokenizer(), open_corpus(path), SMALL, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "transcoder").exists()


def test_text_jsonl_and_parquet_hold_the_same_documents(tmp_path):
    documents = ["one two", "three", "four five six"]
    (tmp_path / "a.txt").write_text("\n\n".join(documents) + "\n")
    (tmp_path / "lines.txt").write_text("\n".join(documents) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    for name in ("a.txt", "lines.txt", "a.jsonl", "a.parquet"):
        assert list(open_corpus(tmp_path / name).documents(0)) == documents, name
        assert list(open_corpus(tmp_path / name).documents(2)) == documents[2:], name


def test_other_text_of_the_same_length_is_another_corpus(tmp_path):
    for text in ("one two", "six ten"):
        (tmp_path / text[:3]).mkdir()
        (tmp_path / text[:3] / "data.txt").write_text(text)
    one, other = (open_corpus(tmp_path / name / "data.txt") for name in ("one", "six"))
    assert one.name == other.name
    assert one.content != other.content


def test_documents_without_text_are_passed_over():
    packed = pack(tokens_corpus(["", "w1 w2", " ", "w3"], "texts"), tiny_tokenizer(), context=4)
    assert packed.next(2).tolist() == [[1, 3, 4, 5], [1, 3, 4, 5]]
    blank = pack(tokens_corpus(["", " "], "texts"), tiny_tokenizer(), context=4)
    with pytest.raises(TranscoderError, match="texts has 2 documents for 1 streams; expected text"):
        blank.next(1)


class Rows(list):
    """As much of a data set of the Hub as is used of it."""

    def skip(self, n):
        return self[n:]


def test_rows_of_the_hub_without_text_are_counted_and_left_out(monkeypatch):
    rows = Rows({"text": text} for text in ("w1", None, "w2"))
    datasets = SimpleNamespace(load_dataset=lambda *_, **__: rows)
    errors = SimpleNamespace(DataFilesNotFoundError=OSError, DatasetNotFoundError=OSError)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", errors)
    corpus = open_corpus("organisation/texts")
    assert list(corpus.documents(0)) == ["w1", "", "w2"]
    assert list(corpus.documents(2)) == ["w2"]
    assert pack(corpus, tiny_tokenizer(), context=3).next(1).tolist() == [[1, 3, 4]]


def test_a_data_set_is_read_through_the_datasets_package(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for split, documents in {"train": ["w1", None, "w2 w3", "w4"], "test": ["w5"]}.items():
        rows = "".join(json.dumps({"text": text, "number": 7}) + "\n" for text in documents)
        (tmp_path / "texts" / f"{split}.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus("texts@main")  # with a revision it is no folder whose files are read without the package
    assert list(corpus.documents(0)) == ["w1", "", "w2 w3", "w4"]
    assert list(corpus.documents(2)) == ["w2 w3", "w4"]
    assert list(open_corpus("texts@main", split="test").documents(0)) == ["w5"]
    assert pack(corpus, tiny_tokenizer(), context=3).next(2).tolist() == [[1, 3, 4], [1, 5, 6]]
    with pytest.raises(TranscoderError, match=r"texts@main has no column 'body'; it has text, number\."):
        next(open_corpus("texts@main", column="body").documents(0))
    with pytest.raises(TranscoderError, match=r"column 'number' of texts@main holds int; expected text"):
        next(open_corpus("texts@main", column="number").documents(0))
    with pytest.raises(TranscoderError, match="texts@main is neither a file here nor a data set that can be read"):
        open_corpus("texts@main", split="missing")
    transcoder = train(tiny_llama(0), tiny_tokenizer(), corpus, replace(SMALL, tokens=512), tmp_path / "out")
    assert transcoder.config.n_features == 48
