"""The `trace train` command: its options, a live line, and what ends it."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

SECONDS_BETWEEN_LINES = 10.0
BY_SIGNAL = 128
"""Exit statuses of processes that a signal ended are so much more than its number."""


@click.command("train")
@click.option(
    "--data", required=True, help="Text to train on: a file, a folder (text, JSONL, Parquet) or a Hub data set."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run; a run there goes on.")
@click.option("--model", help="Hugging Face model directory or NAME[@REVISION].  [default: the bundled lab model]")
@click.option("--column", default="text", show_default=True, help="Column of the text in JSONL, Parquet and Hub data.")
@click.option("--split", default="train", show_default=True, help="Part of a Hub data set.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the language model.",
)
@click.option("--n-features", default=4096, show_default=True, help="Features of each layer.")
@click.option("--per-layer", is_flag=True, help="Let features write to their own layer only.")
@click.option("--skip", is_flag=True, default=False, help="Let each layer also write a linear map of what it reads.")
@click.option("--reads", default="mlp.hook_in", show_default=True, help="Where features read.")
@click.option("--writes", default="hook_mlp_out", show_default=True, help="What they write to.")
@click.option(
    "--activation",
    default="batchtopk",
    show_default=True,
    type=click.Choice(["batchtopk", "topk", "jumprelu", "relu"]),
    help="How features are kept few.",
)
@click.option("--k", default=16, show_default=True, help="Active features per layer and token.")
@click.option("--sparsity", default=1.0, show_default=True, help="Weight of the penalty of jumprelu and relu.")
@click.option("--tokens", default=20_000_000, show_default=True, help="Tokens to train on.")
@click.option("--batch-tokens", default=4096, show_default=True, help="Tokens in a step.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option(
    "--weights",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="Precision of the transcoder's weights; bfloat16 is rounded stochastically.",
)
@click.option(
    "--moments",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "8bit"]),
    help="The optimiser's two numbers for each weight.",
)
@click.option(
    "--products",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="Precision of products with float32 weights.",
)
@click.option(
    "--balanced/--not-balanced",
    default=None,
    help="Let each token's error count by its own size.  [default: where attention sinks dominate]",
)
@click.option("--context", type=int, help="Tokens in a sequence.  [default: 128, or what the model reads if less]")
@click.option("--buffer-tokens", default=131_072, show_default=True, help="Tokens that the shuffling buffer holds.")
@click.option("--streams", default=1, show_default=True, help="Parts of the data, to be shared out to processes.")
@click.option("--seed", default=0, show_default=True)
@click.option("--shards", type=int, help="Under torchrun: processes that share out the features.  [default: all]")
@click.option("--cache", type=click.Path(path_type=Path), help="Keep activations in this folder for other runs.")
@click.option("--report-every", default=20, show_default=True, help="Steps between rows of metrics.")
@click.option("--checkpoint-every", default=500, show_default=True, help="Steps between checkpoints.")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Also write metrics for TensorBoard there.")
def train(
    data: str,
    out: Path,
    model: str | None,
    column: str,
    split: str,
    device: str,
    dtype: str,
    per_layer: bool,
    shards: int | None,
    cache: Path | None,
    report_every: int,
    checkpoint_every: int,
    context: int | None,
    tensorboard: Path | None,
    **settings: Any,
) -> None:
    """Train a transcoder of a language model, to be traced with.

    The run's folder gets run.json, metrics.parquet, the last checkpoint and, at the end, transcoder/. The same command
    again goes on from the last checkpoint; SIGTERM writes one and ends with status 143, Ctrl-C with 130. Under torchrun
    the features, or with --shards and --streams the data too, are shared out to all processes.

    \b
    Examples:
      trace train --data stories.jsonl --out run --n-features 2048 --tokens 5_000_000
      trace train --model org/model --data org/texts --out run --device cuda --dtype bfloat16
      torchrun --nproc-per-node 4 -m tracer train --data texts/ --out run
      trace sql run "SELECT step, loss, l0, dead FROM metrics"
      trace "Once upon a time" --model org/model --transcoder run/transcoder
    """
    from tracer.loading import load_for_training
    from transcoders import Reporting, Stopped, TrainConfig
    from transcoders.corpus import open_corpus
    from transcoders.families import longest_context
    from transcoders.interrupts import asked_to_stop
    from transcoders.parallel import joined
    from transcoders.train import train_to_folder

    reporting = Reporting(report_every, checkpoint_every)
    config = TrainConfig(cross_layer=not per_layer, **settings)
    config = config if context is None else replace(config, context=context)
    corpus = open_corpus(data, column=column, split=split)
    network, tokenizer, name = load_for_training(model, device, dtype)
    if context is None:
        config = replace(config, context=min(config.context, longest_context(network) or config.context))
    with asked_to_stop() as asked:
        try:
            with (
                joined(shards, str(network.device)) as place,
                _telling(config.steps, tensorboard, quiet=not place.is_first) as (on_step, on_report),
            ):
                reporting = replace(
                    reporting, on_report=on_report, on_step=on_step, should_stop=lambda: bool(asked)
                )  # fmt: skip
                train_to_folder(
                    network, tokenizer, corpus, config, out, place=place, reporting=reporting, cache=cache,
                    model_name=name,
                )  # fmt: skip
                if place.is_first:
                    click.echo(f"{out / 'transcoder'} is ready; trace with --transcoder {out / 'transcoder'}")
        except Stopped as stopped:
            click.echo(f"trace: {stopped}", err=True)
            sys.exit(BY_SIGNAL + (asked[0] if asked else signal.SIGTERM))  # another process may have been asked


@contextmanager
def _telling(
    steps: int, tensorboard: Path | None, *, quiet: bool
) -> Iterator[tuple[Callable[[int, int], None], Callable[[dict[str, Any]], None]]]:
    """What to call at every step and with every row of metrics: a live line on terminals, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True, quiet=quiet)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),  # or 80 columns would cut it rather than the bar
        TextColumn("{task.description}"),
    )
    written = 0.0
    write = _tensorboard_writer(tensorboard) if tensorboard and not quiet else None
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=steps)

        def on_step(step: int, steps: int) -> None:
            progress.update(task, completed=step)

        def on_report(row: dict[str, Any]) -> None:
            nonlocal written
            progress.update(task, description=_line(row))
            if not console.is_terminal and (time.time() - written > SECONDS_BETWEEN_LINES or row["step"] == steps):
                console.print(f"step {row['step']}/{steps}  {_line(row)}", soft_wrap=True, highlight=False)
                written = time.time()
            if write is not None:
                write(row)

        yield on_step, on_report


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s  loss {row['loss']:.4f}  NMSE {row['nmse']:.4f}  "
        f"L0 {row['l0']:.1f}  dead {row['dead']:.1%}"
    )


def _tensorboard_writer(folder: Path) -> Callable[[dict[str, Any]], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise click.ClickException("--tensorboard needs another package: pip install tensorboard.") from error
    writer = SummaryWriter(str(folder))

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write
