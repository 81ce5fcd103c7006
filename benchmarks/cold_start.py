"""Seconds from typing a command to its answer: `trace` on the bundled model, its help, the list and a query.

python -m benchmarks.cold_start
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
from rich.console import Console
from rich.table import Table

PROMPT = "the capital of the state containing Dallas is"
COMMANDS = {
    "trace PROMPT": ["prompt", PROMPT, "--json", "--store", "store"],
    "trace --help": ["--help"],
    "trace list": ["list", "store"],
    "trace sql": ["sql", "store", "SELECT count(*) FROM edges"],
}


@click.command()
@click.option("--repeats", default=7, show_default=True)
def main(repeats: int) -> None:
    """Print a table: every command as a process of its own, in an empty folder."""
    table = Table("command", "median s", "least s", "most s", "of which the trace, median s")
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in COMMANDS.items():
            whole, traced = [], []
            for _ in range(repeats):
                seconds, output = _run(arguments, Path(folder))
                whole.append(seconds)
                if name == "trace PROMPT":
                    traced.append(json.loads(output)["seconds"])
            inside = f"{median(traced):.3f}" if traced else ""
            table.add_row(name, f"{median(whole):.2f}", f"{min(whole):.2f}", f"{max(whole):.2f}", inside)
    Console(width=100).print(table)


def _run(arguments: list[str], folder: Path) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tracer", *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - start, done.stdout


if __name__ == "__main__":
    main()
