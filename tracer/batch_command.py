"""The command `trace batch`: a file of prompts into one store."""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracer.options import model_options, trace_options, writable_store

if TYPE_CHECKING:
    from graphs import GraphStore
    from tracer.batch import Job, Outcome
    from tracer.prompts import Row

SECONDS_BETWEEN_LINES = 60.0
"""How often it is told how far the batch is, where stderr is no terminal."""


@click.command("batch")
@click.argument("file", type=click.Path(path_type=Path))
@model_options
@click.option("--column", metavar="NAME", help="Column with the prompts.  [default: prompt, or the only text column]")
@click.option("--limit", type=click.IntRange(min=1), help="Trace only the first prompts of FILE, at most this many.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes per device, each with a model of its own; they divide the processor's cores.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Processes of this machine, or actors of a Ray cluster.",
)
@click.option("--address", help="Ray cluster, as ray://HOST:10001 or auto.  [default: one is started here]")
@trace_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def batch(
    file: Path, model: str | None, transcoder: str | None, tokenizer: str | None, device: str, dtype: str, store: Path,
    column: str | None, limit: int | None, workers: int, engine: str, address: str | None, no_prune: bool,
    as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Trace every prompt of FILE and save the graphs in one store.

    FILE is text with a prompt a line, CSV with a header (.csv, or .tsv with tabs), JSONL (.jsonl) or Parquet
    (.parquet). Its other columns are kept as tags of the graphs: in SQL, tags['NAME'].

    A prompt whose graph with the same settings is in the store is not traced again: after an interruption, run the
    same command again. A prompt that comes several times is traced once, with the tags of its first row.

    Prompts that fail are listed with row number and error in STORE.failed.jsonl beside the store, and do not stop the
    others. Exit status: 0 if all prompts have their graphs, 1 if some failed, 2 if the batch could not be done.

    \b
    Examples:
      trace batch prompts.txt --workers 2
      trace batch prompts.parquet --column question --limit 100 --store my-graphs
      trace batch prompts.jsonl --engine ray --address auto --store /shared/graphs
      trace sql "SELECT tags['group'], avg(replacement_score) FROM graphs GROUP BY 1"
    """
    from tracer.batch import Job
    from tracer.config import TraceConfig
    from tracer.errors import TraceError
    from tracer.loading import Source
    from tracer.prompts import distinct, longest_first, read_prompts

    source = Source(model, transcoder, device, dtype, tokenizer)
    config = TraceConfig(prune=not no_prune, **settings)
    if address is not None and engine != "ray":
        raise TraceError("--address was given without --engine ray; give both, or neither.")
    folder = writable_store(store)
    failures = _failures_path(folder)
    if failures == file.resolve():
        raise TraceError(f"{file} is where this batch lists its own failures; give it another name first.")
    rows = read_prompts(file, column, limit=limit)
    todo = longest_first(distinct(rows))
    job = Job(store, source, config)
    summary = _run(_outcomes(job, todo, workers, engine, address), len(todo), folder, failures)
    summary["duplicates"] = len(rows) - len(todo)
    click.echo(json.dumps(summary, ensure_ascii=False, indent=2) if as_json else _text(summary))
    if summary["failed"]:
        sys.exit(1)


def _outcomes(
    job: "Job", rows: "list[Row]", workers: int, engine: str, address: str | None
) -> "Generator[Outcome, None, None]":
    if engine == "ray":
        from tracer.ray_engine import trace_on_ray

        return trace_on_ray(job, rows, address, workers)
    from tracer.loading import resolve_devices
    from tracer.processes import trace_in_processes

    return trace_in_processes(job, rows, resolve_devices(job.source.device) * workers)


def _run(
    outcomes: "Generator[Outcome, None, None]", n_rows: int, store: "GraphStore", failures: Path
) -> dict[str, Any]:
    """Hear all outcomes, and count them."""
    from tracer.batch import Status
    from tracer.errors import TraceError

    counts, doubts = {status: 0 for status in Status}, []
    start = time.perf_counter()
    try:
        with closing(outcomes), _progress(n_rows) as advance:
            for number, outcome in enumerate(outcomes):
                if number == 0:
                    _remove(failures)  # of the run before, now that this one has begun
                counts[outcome.status] += 1
                doubts += [outcome.doubt] if outcome.doubt else []
                if outcome.status == Status.FAILED:
                    _note(outcome, failures)
                advance(counts[Status.FAILED])
    except KeyboardInterrupt:
        raise TraceError(
            f"interrupted after {sum(counts.values())} of {n_rows} prompts; their graphs are in {store.folder}, and "
            "the same command goes on from there."
        ) from None
    return {
        "store": str(store.folder), "prompts": n_rows, **{status.value: counts[status] for status in Status},
        "failures": str(failures) if counts[Status.FAILED] else None,
        "doubtful": len(doubts), "doubt": next(iter(doubts), None), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _failures_path(store: "GraphStore") -> Path:
    folder = store.folder.resolve()
    return folder.with_name(f"{folder.name}.failed.jsonl")


def _remove(failures: Path) -> None:
    with _writing(failures):
        failures.unlink(missing_ok=True)


def _note(outcome: "Outcome", failures: Path) -> None:
    """At once, so that the list is there whatever happens next."""
    row = outcome.row
    line = json.dumps({"row": row.number, "prompt": row.prompt, "error": outcome.error, "tags": dict(row.tags)})
    with _writing(failures), failures.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def _writing(failures: Path) -> Iterator[None]:
    from tracer.errors import TraceError

    try:
        yield
    except OSError as error:
        raise TraceError(f"failures cannot be listed in {failures}: {error.strerror}; use another --store.") from error


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Tell on stderr how far the batch is and when it will end; what is yielded is called after each prompt."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("tracing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, failed=0)
        start = told = time.monotonic()

        def advance(failed: int) -> None:
            nonlocal told
            bar.update(task, advance=1, failed=failed)
            now = time.monotonic()
            if not console.is_terminal and now - told >= SECONDS_BETWEEN_LINES:
                told = now
                click.echo(progress_line(int(bar.tasks[0].completed), total, failed, now - start), err=True)

        yield advance


def progress_line(done: int, total: int, failed: int, seconds: float) -> str:
    """How far the batch is after so many seconds, and when it will end if it goes on like this."""
    left = seconds / done * (total - done) / 60
    return f"trace: {done} of {total} prompts, {failed} failed, {left:.0f} minutes left"


def _text(summary: dict[str, Any]) -> str:
    lines = [f"Traced   {summary['traced']} of {summary['prompts']} prompts in {summary['seconds']:.1f} s"]
    if summary["found"]:
        lines.append(f"Found    {summary['found']} in the store already")
    if summary["duplicates"]:
        lines.append(f"Twice    {summary['duplicates']} prompts came before, and were traced once")
    if summary["failed"]:
        lines.append(f"Failed   {summary['failed']}, listed in {summary['failures']}")
    if summary["doubtful"]:
        lines.append(f"Doubtful {summary['doubtful']}, the first: {summary['doubt']}")
    return "\n".join([*lines, f"Saved    in {summary['store']}"])
