"""The `trace evaluate` command: its options and what they lead to."""

from pathlib import Path

import click


@click.command("evaluate")
@click.option("--model", help="Hugging Face model directory or NAME[@REVISION].  [default: the bundled lab model]")
@click.option("--transcoder", help="Transcoder for that model: a folder in any known layout, or a Hub id.")
@click.option("--data", help="Text: a file or folder (text, JSONL, Parquet) or a Hub data set; every token is an answer.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Prompts, one a line or in a column of JSONL or Parquet: the answer is what follows.  [default: those bundled]",
)
@click.option("--column", default="text", show_default=True, help="Column of the text in JSONL, Parquet and Hub data.")
@click.option("--split", default="train", show_default=True, help="Part of a Hub data set.")
@click.option("--context", default=128, show_default=True, help="Tokens in a sequence of --data.")
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
    context: int, tokens: int, graphs: int, device: str, dtype: str, as_json: bool, html: Path | None,
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
    import json

    from tracer.commands import load_replacement, progress
    from tracer.errors import TraceError

    if model is not None and (transcoder is None or (data is None and prompts is None)):
        raise TraceError("--model needs a --transcoder, and --data or --prompts; what is bundled is for the lab model.")
    if data is not None and prompts is not None:
        raise TraceError("--data and --prompts were both given; evaluate on one of them at a time.")
    if html is not None and not html.absolute().parent.is_dir():
        raise TraceError(f"the folder of {html} does not exist; make it first.")
    if min(tokens, context) < 2 or graphs < 0:
        raise TraceError("expected 2 or more --tokens and --context, and 0 or more --graphs.")
    replacement = load_replacement(model, transcoder, device, dtype)
    from tracer import lab
    from tracer.evaluation import evaluate, ready_to_evaluate
    from tracer.evaluation_page import evaluation_page
    from tracer.evaluation_report import evaluation_record, evaluation_text
    from tracer.material import material_of_corpus, material_of_prompts, read_prompts
    from transcoders.corpus import open_corpus
    from transcoders.files import told_in_one_line, write_atomically

    with progress() as step:
        step("reading the data", 0, 0)
        if data is not None:
            material = material_of_corpus(
                replacement, open_corpus(data, column=column, split=split), context=context, n_tokens=tokens,
                n_graphs=graphs,
            )  # fmt: skip
        else:
            path = prompts or lab.folder() / "prompts.txt"
            material = material_of_prompts(replacement, read_prompts(path, column), path.name, graphs)
        if model is None:
            for prompt in material.traced:
                lab.check_words(prompt)
        step("reading the transcoder", 0, 0)
        ready = ready_to_evaluate(replacement, transcoder or lab.folder() / "transcoder")
        record = evaluation_record(evaluate(ready, material, on_progress=step))
    click.echo(json.dumps(record, ensure_ascii=False, indent=2) if as_json else evaluation_text(record))
    if html is not None:
        with told_in_one_line(f"write {html}"):
            write_atomically(html, lambda file: file.write_text(evaluation_page(record), encoding="utf-8"))
        click.echo(f"wrote {html}", err=True)
