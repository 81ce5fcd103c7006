"""`trace evaluate`: what it measures, prints and draws, on the bundled lab model and on a tiny one."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner, Result

from graphs import score_from
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tracer import lab
from tracer.charts import bars, heat_table, lines, numbered, table
from tracer.cli import cli
from tracer.config import TraceConfig
from tracer.errors import TraceError
from tracer.evaluation import evaluate
from tracer.evaluation_page import evaluation_page
from tracer.evaluation_report import bucket_names, evaluation_record, evaluation_text
from tracer.material import material_of_corpus, material_of_prompts, opening, read_prompts, spread
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel
from transcoders import save
from transcoders.corpus import tokens_corpus

HOSTILE = '<img src=x onerror=alert(1)> & "quoted"'
PROMPTS = ["w3 w1 w4", "w1 w5 w9 w2 w6", "w5 w3"]
VOID = {"meta", "line", "circle", "rect", "polyline"}


class Elements(HTMLParser):
    """Every element of a page, in a tree that closes what it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.attributes, self.texts, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in VOID or (self.open and tag in ("circle", "rect")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read_page(text: str) -> Elements:
    page = Elements()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def tiny() -> ReplacementModel:
    return ReplacementModel.of(tiny_llama(0), tiny_tokenizer(), tiny_transcoder(1))


def tiny_record(prompts=PROMPTS, n_graphs=2) -> dict:
    replacement = tiny()
    return evaluation_record(evaluate(replacement, material_of_prompts(replacement, prompts, "three", n_graphs)))


def run(*arguments) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[dict, str]:
    """The lab's evaluation on six of its prompts: as data, and as a page."""
    folder = tmp_path_factory.mktemp("evaluated")
    prompts = read_prompts(lab.folder() / "prompts.txt", "text")
    (folder / "few.txt").write_text("\n".join(prompts[:20:4]), encoding="utf-8")
    result = run("--prompts", folder / "few.txt", "--graphs", 2, "--json", "--html", folder / "page.html")
    assert result.exit_code == 0, repr(result.exception)
    assert result.stderr == f"wrote {folder / 'page.html'}\n"
    assert [path.name for path in sorted(folder.iterdir())] == ["few.txt", "page.html"]
    return json.loads(result.stdout), (folder / "page.html").read_text(encoding="utf-8")


def test_json_holds_every_measure_of_every_layer(printed):
    record, _ = printed
    assert (record["model"], record["transcoder"], record["data"]) == ("lab", "lab-clt", "few.txt")
    assert (record["sequences"], record["answers"], record["n_layers"], record["n_features"]) == (5, 5, 6, 1024)
    assert [one["layer"] for one in record["layers"]] == [0, 1, 2, 3, 4, 5]
    for one in record["layers"]:
        assert sum(one["density_histogram"]) == 1024
        assert one["density_histogram"][0] == pytest.approx(1024 * one["dead"])
        assert [norm is None for norm in one["decoder_norms"]] == [target < one["layer"] for target in range(6)]
        assert 0 <= one["up_to"]["top1_match"] <= 1 and one["alone"]["kl"] >= -1e-6
    assert record["layers"][0]["alone"] == record["layers"][0]["up_to"]
    assert record["layers"][5]["up_to"] == {"top1_match": record["top1_match"], "kl": record["kl"]}
    assert record["l0"] == pytest.approx(sum(one["l0"] for one in record["layers"]))
    assert record["nmse"] == pytest.approx(sum(one["nmse"] for one in record["layers"]) / 6)
    for parts in (record["by_norm"], record["by_position"]):
        assert sum(one["tokens"] for one in parts) == 6 * record["tokens"]
        assert {one["top1_match"] for one in parts} <= {1.0, None} and any(one["top1_match"] for one in parts)
    assert record["at_answer"]["tokens"] == 6 * 5
    assert len(record["graphs"]["prompts"]) == 2


def test_a_transcoder_that_answers_well_on_the_lab_scores_well(printed):
    record, _ = printed
    assert record["top1_match"] == 1.0
    assert record["graphs"]["replacement"] > 0.6 and record["graphs"]["completeness"] > 0.8


def test_the_page_is_whole_and_fetches_nothing(printed):
    _, text = printed
    page = read_page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.names)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert page.names.count("svg") == 2 + 3 + 6
    assert ("name", "viewport") in page.attributes


def test_the_page_holds_the_numbers(printed):
    record, text = printed
    texts = set(read_page(text).texts)
    for one in record["layers"]:
        for value in (one["nmse"], one["relative_error"], one["alone"]["kl"], one["up_to"]["kl"]):
            assert f"{value:.4f}" in texts
        assert f"{one['l0']:.1f}" in texts and f"{one['dead']:.1%}" in texts
        assert {f"{norm:.3f}" for norm in one["decoder_norms"] if norm is not None} <= texts
    for bucket in (*record["by_norm"], *record["by_position"]):
        if bucket["tokens"]:
            assert f"{bucket['relative_error']:.4f}" in texts
    for prompt in record["graphs"]["prompts"]:
        assert {prompt["prompt"], f"{prompt['replacement']:.3f}", f"{prompt['completeness']:.3f}"} <= texts


def test_the_tables_hold_the_numbers(printed):
    record, _ = printed
    text = evaluation_text(record)
    assert f"top-1 match {record['top1_match']:.1%}, KL {record['kl']:.4f} nats, all MLPs replaced" in text
    assert f"replacement {record['graphs']['replacement']:.3f}" in text
    [row] = [line for line in text.splitlines() if line.startswith(" 3 ")]
    layer = record["layers"][3]
    assert [cell.strip() for cell in row.split("│")] == [
        "3", f"{layer['nmse']:.4f}", f"{layer['relative_error']:.4f}", f"{layer['l0']:.1f}", f"{layer['dead']:.1%}",
        f"{layer['alone']['top1_match']:.1%}", f"{layer['alone']['kl']:.4f}",
        f"{layer['up_to']['top1_match']:.1%}", f"{layer['up_to']['kl']:.4f}",
    ]  # fmt: skip


def test_scores_are_those_of_the_traces():
    record = tiny_record()
    replacement = tiny()
    graphs = [trace(prompt, replacement, TraceConfig(prune=False)).graph for prompt in (PROMPTS[0], PROMPTS[1])]
    assert [one["prompt"] for one in record["graphs"]["prompts"]] == PROMPTS[:2]
    for one, graph in zip(record["graphs"]["prompts"], graphs, strict=True):
        scores = score_from(graph, np.nan_to_num(graph.influence))
        assert one["replacement"] == pytest.approx(scores.replacement)
        assert one["completeness"] == pytest.approx(scores.completeness)
        assert one["active_features"] == graph.info.n_active_features
    assert record["graphs"]["replacement"] == pytest.approx(
        sum(one["replacement"] for one in record["graphs"]["prompts"]) / 2
    )


def test_half_precision_weights_are_computed_with_in_full_precision():
    model = tiny_llama(0)
    rounded = tiny_llama(0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    records = []
    for network in (model, rounded.bfloat16()):
        replacement = ReplacementModel.of(network, tiny_tokenizer(), tiny_transcoder(1))
        records.append(evaluation_record(evaluate(replacement, material_of_prompts(replacement, PROMPTS, "three", 1))))
        assert {parameter.dtype for parameter in network.parameters()} == {next(network.parameters()).dtype}
    for name in ("nmse", "relative_error", "l0", "kl"):
        assert records[1][name] == pytest.approx(records[0][name], rel=1e-4, abs=1e-6)


def test_nothing_traced_leaves_out_the_scores_and_their_table():
    record = tiny_record(n_graphs=0)
    assert record["graphs"] == {"replacement": None, "completeness": None, "prompts": []}
    assert "Graphs" not in evaluation_text(record)
    assert "Traced prompts" not in evaluation_page(record)


def test_texts_on_the_page_are_escaped():
    record = tiny_record() | {"data": HOSTILE, "model": HOSTILE}
    record["graphs"]["prompts"][0]["prompt"] = HOSTILE
    page = read_page(evaluation_page(record))
    assert "img" not in page.names
    assert HOSTILE in page.texts


def test_text_is_read_out_at_every_token_and_its_openings_are_traced():
    replacement = tiny()
    corpus = tokens_corpus(["w1 " * 40, "w2", "w3 w4 w5"], "three documents")
    material = material_of_corpus(replacement, corpus, context=8, n_tokens=20, n_graphs=5)
    assert not material.reads_last
    assert material.passages.readout.sum() == 21
    assert material.traced == (" ".join(["w1"] * 7), "w3 w4 w5")
    record = evaluation_record(evaluate(replacement, replace(material, traced=())))
    assert record["at_answer"] is None
    assert record["answers"] == record["tokens"] == 21
    assert [one["top1_match"] is None for one in record["by_position"]] == [False, False, True, True]
    assert evaluation_page(record).count("<svg") == 2 + 3 + 3


@pytest.mark.parametrize("context", [1, 33])
def test_a_context_that_the_model_cannot_read_is_refused(context):
    with pytest.raises(TraceError, match=f"--context is {context}; the model reads 32 tokens at most"):
        material_of_corpus(tiny(), tokens_corpus(["w1 w2"], "x"), context=context, n_tokens=9, n_graphs=0)


def test_sequences_are_as_long_as_the_model_reads_by_default():
    corpus = tokens_corpus(["w1 " * 100], "a hundred words")
    material = material_of_corpus(tiny(), corpus, context=None, n_tokens=99, n_graphs=0)
    assert material.passages.tokens.shape == (4, 32)


def test_an_opening_ends_after_a_token():
    assert opening(tiny(), "w1 w2  w3 w4", 3) == "w1 w2  w3"
    assert opening(tiny(), "w1 w2", 3) == "w1 w2"
    assert opening(tiny(), "w1", 3) == ""


def test_traced_prompts_are_spread_over_all():
    assert spread(["a", "b", "c", "d", "e"], 2) == ["a", "c"]
    assert spread(["a", "b"], 5) == ["a", "b"]
    assert spread(["a", "b"], 0) == []


def test_prompts_are_lines_or_a_column(tmp_path):
    (tmp_path / "lines.txt").write_text("one two\n\n three \n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one\\ntwo"}\n{"prompt": "three"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "lines.txt", "text") == ["one two", "three"]
    assert read_prompts(tmp_path / "rows.jsonl", "prompt") == ["one\ntwo", "three"]


def test_the_bundled_prompts_are_known_to_the_bundled_model():
    prompts = read_prompts(lab.folder() / "prompts.txt", "text")
    assert len(prompts) == 20
    for prompt in prompts:
        lab.check_words(prompt, lab.words())


def test_a_transcoder_and_a_model_of_ones_own_are_evaluated(tmp_path):
    tiny_llama(0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    save(tiny_transcoder(1), tmp_path / "transcoder")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"words": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8"
    )
    result = run(
        "--model", tmp_path / "model", "--transcoder", tmp_path / "transcoder", "--prompts", tmp_path / "rows.jsonl",
        "--column", "words", "--graphs", 2, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, repr(result.exception)
    record, expected = json.loads(result.stdout), tiny_record()
    for name in ("nmse", "relative_error", "l0", "top1_match", "kl"):
        assert record[name] == pytest.approx(expected[name], rel=1e-5)
    texts = run(
        "--model", tmp_path / "model", "--transcoder", tmp_path / "transcoder", "--data", tmp_path / "rows.jsonl",
        "--column", "words", "--graphs", 0, "--context", 8, "--tokens", 7,
    )  # fmt: skip
    assert texts.exit_code == 0, repr(texts.exception)
    assert "7 tokens in 1 sequences, 7 answers" in texts.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "m"), "--model needs a --transcoder, and --data or --prompts"),
        (("--model", "m", "--transcoder", "t"), "--model needs a --transcoder, and --data or --prompts"),
        (("--data", "d.txt", "--prompts", "words.txt"), "--data and --prompts were both given"),
        (("--html", "nowhere/page.html"), "the folder of nowhere/page.html does not exist; make it first"),
        (("--graphs", "-1"), "--graphs is -1; expected 1 or more, and 0 or more"),
        (("--tokens", "0"), "--tokens is 0"),
        (("--prompts", "empty.txt"), "empty.txt holds no prompt; expected one on each line"),
        (("--prompts", "words.txt"), "'Gotham' is not a word of the lab model"),
        (("--prompts", "bytes.txt"), "bytes.txt cannot be read"),
        (("--prompts", "words.csv"), "words.csv is of no known kind"),
        (("--transcoder", "nothing"), "nothing"),
        (("--data", "words.txt", "--context", "999"), "--context is 999; the model reads"),
    ],
)
def test_bad_input_is_refused_with_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("the capital of Gotham is\n", encoding="utf-8")
    (tmp_path / "words.csv").write_text("the capital of Gotham is\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    result = run(*arguments)
    assert isinstance(result.exception, ValueError)
    assert type(result.exception).__name__ in ("TraceError", "TranscoderError")
    assert message in str(result.exception)
    assert "\n" not in str(result.exception).strip()


def test_bucket_names_say_where_they_begin_and_end():
    assert bucket_names((0.5, 1.0, 2.0)) == ["<0.5", "0.5 to <1", "1 to <2", "≥2"]


def test_a_line_chart_puts_values_where_the_axis_says():
    text = lines("Errors", {"one": [0.0, 1.0], "two": [0.5, None]}, across="layer", top=1.0, show="{:g}".format)
    page = read_page(text)
    heights = [float(value) for name, value in page.attributes if name == "cy"]
    assert heights == [166.0, 10.0, 88.0]
    assert {"one, layer 0: 0", "one, layer 1: 1", "two, layer 0: 0.5"} <= set(page.texts)
    assert {"0", "0.5", "1"} <= set(page.texts)


@pytest.mark.parametrize("largest", [3e-7, 0.0752, 1.0, 19.9, 1024.0])
def test_an_axis_ends_at_a_round_number_that_is_no_smaller(largest):
    text = bars("Values", [largest, 0.0], ["a", "b"], numbered(2), across="", show=repr)
    ticks = [float(one) for one in re.findall(r'class="tick"[^>]*>([^<]+)<', text)]
    assert ticks[0] == 0 and len(ticks) in (3, 4, 5, 6)
    assert largest <= ticks[-1] * (1 + 1e-9) < 2.1 * largest
    assert f"{ticks[1]:e}"[0] in "125" and math.isclose(ticks[1], float(f"{ticks[1]:.0e}"))


def test_charts_of_nothing_but_zeros_are_drawn():
    assert "NaN" not in bars("Dead", [0.0, 0.0], ["a", "b"], numbered(2), across="layer", show="{:g}".format)
    assert 'style="--heat:0%"' in heat_table("", ["a"], [("b", [0.0])], "{:g}".format)


def test_tables_escape_what_they_hold():
    text = table(["<a>", "b"], [["<i>", "1"]]) + heat_table("<u>", ["<s>"], [("<q>", [None])], "{:g}".format)
    assert not {"a", "i", "u", "s", "q"} & set(read_page(text).names)
    assert "–" in read_page(text).texts
