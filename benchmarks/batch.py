"""Graphs a second of `trace batch` on the bundled lab model, and whether the order of prompts matters.

    python -m benchmarks.batch                 # 1 and 2 workers, in file order and the longest first
    python -m benchmarks.batch --mixed         # the same with a random model and prompts of 8 to 192 tokens
    python -m benchmarks.batch --ray           # also two actors of a local Ray cluster
    python -m benchmarks.batch --profile       # where the time of one worker goes, function by function

Lab prompts are of much the same length, 5 to 20 tokens.
"""

import cProfile
import pstats
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from benchmarks.random_case import Case, write_case
from examples.lab.world import questions, read_world
from tracer.batch import Job, Outcome, Status
from tracer.config import TraceConfig
from tracer.loading import Source
from tracer.processes import trace_in_processes
from tracer.prompts import Row, longest_first

MIXED = Case(n_layers=4, d_model=128, n_features=1024, n_tokens=192, l0=16)

_Engine = Callable[[Job, Sequence[Row]], Iterator[Outcome]]


@click.command()
@click.option("--prompts", default=400, show_default=True, help="Lab prompts to trace; of the random model a quarter.")
@click.option("--repeats", default=1, show_default=True, help="The best of so many runs is shown.")
@click.option("--mixed", is_flag=True, help="Trace prompts of 8 to 192 tokens of a random model instead.")
@click.option("--workers", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--ray", "with_ray", is_flag=True, help="Also measure two actors of a local Ray cluster.")
@click.option("--profile", is_flag=True, help="Print a profile of one worker instead.")
def main(
    prompts: int, repeats: int, mixed: bool, workers: tuple[int, ...], with_ray: bool, profile: bool
) -> None:  # fmt: skip
    """Print a table, line by line: graphs a second by workers, engine and order."""
    with tempfile.TemporaryDirectory() as temporary:
        rows, source = lab_rows(prompts), Source(device="cpu")
        if mixed:
            write_case(MIXED, Path(temporary))
            rows = mixed_rows(prompts // 4)
            source = Source(f"{temporary}/model", f"{temporary}/transcoder", device="cpu")
        if profile:
            print_profile(rows, source)
            return
        click.echo("| engine | workers | order | graphs | graphs/s | s with loading |\n|---|---|---|---|---|---|")
        for name, n, run in _engines(workers, with_ray):
            for order, ordered in (("file", rows), ("length", longest_first(rows))):
                rate, seconds = max(measured(run, source, ordered, n) for _ in range(repeats))
                click.echo(f"| {name} | {n} | {order} | {len(rows)} | {rate:.1f} | {seconds:.1f} |")


def lab_rows(n: int) -> list[Row]:
    """So many prompts of the lab, drawn from all of them."""
    prompts = sorted({question.prompt for question in questions(read_world())})
    return [Row(number, prompt) for number, prompt in enumerate(random.Random(0).sample(prompts, n), 1)]


def mixed_rows(n: int) -> list[Row]:
    """Random prompts of very different lengths."""
    chosen = random.Random(0)
    words = [f"w{number}" for number in range(900)]
    lengths = [chosen.randrange(7, MIXED.n_tokens) for _ in range(n)]
    return [Row(number, " ".join(chosen.choices(words, k=length))) for number, length in enumerate(lengths, 1)]


def measured(run: _Engine, source: Source, rows: Sequence[Row], workers: int) -> tuple[float, float]:
    """Graphs a second while all workers work, and the seconds that the whole took, loading included."""
    processes: set[int] = set()
    start, counted, first = time.perf_counter(), 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for outcome in run(Job(Path(folder) / "store", source, TraceConfig()), rows):
            assert outcome.status == Status.TRACED, outcome
            if len(processes) == workers:
                counted += 1
            processes.add(outcome.process)
            if len(processes) == workers and not first:
                first = time.perf_counter()
        end = time.perf_counter()
    return counted / (end - first), end - start


def print_profile(rows: Sequence[Row], source: Source) -> None:
    """Where one worker's time goes; cProfile itself makes small functions look slower than they are."""
    from tracer.worker import begin

    with tempfile.TemporaryDirectory() as folder:
        worker = begin(Job(Path(folder) / "store", source, TraceConfig()), "cpu", share=2)
        for row in rows[:5]:
            worker.trace(row)
        profiler = cProfile.Profile()
        profiler.runcall(lambda: [worker.trace(row) for row in rows[5:]])
    stats = pstats.Stats(profiler)
    stats.sort_stats("cumulative").print_stats(50)
    stats.sort_stats("tottime").print_stats(25)


def _engines(workers: Sequence[int], with_ray: bool) -> list[tuple[str, int, _Engine]]:
    """Name, workers and how to run them."""

    def processes(n: int) -> _Engine:
        return lambda job, rows: trace_in_processes(job, rows, ["cpu"] * n)

    found = [("processes", n, processes(n)) for n in workers]
    if with_ray:
        from tracer.ray_engine import trace_on_ray

        found.append(("ray", 2, lambda job, rows: trace_on_ray(job, rows, None, workers=2)))
    return found


if __name__ == "__main__":
    main()
