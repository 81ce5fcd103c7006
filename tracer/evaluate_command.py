"""The `trace evaluate` command: its options and what they lead to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tracer.material import Material
    from tracer.replacement import ReplacementModel


@click.command("evaluate")
@click.option("--model", help="Hugging Face model directory or NAME[@REVISION].  [default: the bundled lab model]")
@click.option("--transcoder", help="Transcoder for that model: a folder in any known layout, or a Hub id.")
@click.option(
    "--data", help="Text: a file or folder (text, JSONL, Parquet) or a Hub data set; every token is an answer."
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Prompts, one a line or in a column of JSONL or Parquet; the answer follows.  [default: some bundled ones]",
)
@click.option("--column", default="text", show_default=True, help="Column of the text in JSONL, Parquet and Hub data.")
@click.option("--split", default="train", show_default=True, help="Part of a Hub data set.")
@click.option("--context", type=int, help="Tokens in a sequence of --data.  [default: 128, or what the model reads]")
@click.option("--tokens", default=16_384, show_default=True, help="Tokens of --data to evaluate on.")
@click.option("--graphs", default=20, show_default=True, help="Prompts to trace for replacement and completeness.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Of the weights; sums are float32 or better.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write one page with plots here.")
def evaluate(
    model: str | None, transcoder: str | None, data: str | None, prompts: Path | None, column: str, split: str,
    context: int | None, tokens: int, graphs: int, device: str, dtype: str, as_json: bool, html: Path | None,
) -> None:  # fmt: skip
    """Measure how well a transcoder stands in for a model's MLPs.

    Per layer: reconstruction errors, also by size and position of the token, active and dead features, where decoders
    write, and how often the model still gives its own answer with the layer replaced, alone and with all before it.
    Some prompts are traced for their replacement and completeness scores.

    \b
    Examples:
      trace evaluate
      trace evaluate --html report.html
      trace evaluate --transcoder run/transcoder --json
      trace evaluate --model org/model --transcoder run/transcoder --data texts.jsonl --tokens 50000
    """
    from tracer.errors import TraceError

    if model is not None and (transcoder is None or (data is None and prompts is None)):
        raise TraceError("--model needs a --transcoder, and --data or --prompts; what is bundled is for the lab model.")
    if data is not None and prompts is not None:
        raise TraceError("--data and --prompts were both given; evaluate on one of them at a time.")
    if html is not None and not html.absolute().parent.is_dir():
        raise TraceError(f"the folder of {html} does not exist; make it first.")
    if tokens < 1 or graphs < 0:
        raise TraceError(f"--tokens is {tokens} and --graphs is {graphs}; expected 1 or more, and 0 or more.")
    from tracer.commands import progress
    from tracer.loading import Source, load

    replacement = load(Source(model, transcoder, device, dtype)).replacement
    with progress() as step:
        step("reading the data", 0, 0)
        if data is None:
            material = _prompts(replacement, prompts, column, graphs, bundled=model is None)
        else:
            material = _text(replacement, data, column, split, context, tokens, graphs, bundled=model is None)
        record = _record(replacement, transcoder, material, step)
    _tell(record, as_json=as_json, html=html)


def _prompts(
    replacement: "ReplacementModel", path: Path | None, column: str, graphs: int, *, bundled: bool
) -> "Material":  # fmt: skip
    """The named prompts, or some bundled ones."""
    from tracer import lab
    from tracer.material import material_of_prompts, read_prompts

    path = path or lab.folder() / "prompts.txt"
    prompts = read_prompts(path, column)
    if bundled:
        for prompt in prompts:
            lab.check_words(prompt, lab.words())
    return material_of_prompts(replacement, prompts, path.name, graphs)


def _text(
    replacement: "ReplacementModel", data: str, column: str, split: str, context: int | None, tokens: int,
    graphs: int, *, bundled: bool,
) -> "Material":  # fmt: skip
    from tracer import lab
    from tracer.material import material_of_corpus
    from transcoders.corpus import open_corpus

    corpus = open_corpus(data, column=column, split=split)
    material = material_of_corpus(replacement, corpus, context=context, n_tokens=tokens, n_graphs=graphs)
    if bundled:
        for prompt in material.traced:
            lab.check_words(prompt, lab.words())
    return material


def _record(
    replacement: "ReplacementModel", transcoder: str | None, material: "Material",
    step: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    from tracer import lab
    from tracer.evaluation import evaluate, ready_to_evaluate
    from tracer.evaluation_report import evaluation_record

    step("reading the transcoder", 0, 0)
    ready = ready_to_evaluate(replacement, transcoder or lab.folder() / "transcoder")
    return evaluation_record(evaluate(ready, material, on_progress=step))


def _tell(record: dict[str, Any], *, as_json: bool, html: Path | None) -> None:
    """The numbers to stdout, and the page to its file."""
    from tracer.evaluation_page import evaluation_page
    from tracer.evaluation_report import evaluation_text
    from transcoders.files import told_in_one_line, write_atomically

    click.echo(json.dumps(record, ensure_ascii=False, indent=2) if as_json else evaluation_text(record))
    if html is not None:
        with told_in_one_line(f"write {html}"):
            write_atomically(html, lambda file: file.write_text(evaluation_page(record), encoding="utf-8"))
        click.echo(f"wrote {html}", err=True)
