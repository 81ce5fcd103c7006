"""Time and memory of attribution over tokens, layers, width and features; the peer's beside it where it is installed.

    python -m benchmarks.attribution                                  # this package
    python -m benchmarks.attribution --peer ~/peer/bin/python         # and circuit-tracer, from its own environment

Every number comes from a process of its own on the same files; seconds are medians over the repeats inside it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.random_case import Case, write_case
from graphs import NodeKind

HERE = Path(__file__).parent
BASE = Case()
SWEEP = {
    "base": BASE,
    "12 tokens": replace(BASE, n_tokens=12),
    "48 tokens": replace(BASE, n_tokens=48),
    "4 layers": replace(BASE, n_layers=4),
    "d 512": replace(BASE, d_model=512),
    "8,192 features, L0 72": replace(BASE, n_features=8192, l0=72),
}


@dataclass(frozen=True)
class Run:
    """What one process took."""

    active: int
    kept_nodes: int
    attribution_seconds: float
    pruning_seconds: float
    whole_seconds: float
    peak_mb: float


@click.command()
@click.option("--peer", type=click.Path(exists=True, dir_okay=False), help="Python that has circuit-tracer.")
@click.option("--only", multiple=True, type=click.Choice(list(SWEEP)), help="Run these cases only.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(peer: str | None, only: tuple[str, ...], repeats: int, threads: int) -> None:
    """Print a table: ours with everything attributed, ours by the coverage rule, and the peer's."""
    table = Table("case", "active", "tracer", "attribution s", "pruning s", "whole s", "peak MB", "ratio", "agreement")
    for name in only or SWEEP:
        with tempfile.TemporaryDirectory() as folder:
            case = Path(folder)
            write_case(SWEEP[name], case)
            shared = ["--repeats", str(repeats), "--threads", str(threads)]
            ours = _run([sys.executable, str(HERE / "trace_ours.py"), folder, *shared, "--edges", f"{folder}/ours.npz"])
            quick = [sys.executable, str(HERE / "trace_ours.py"), folder, *shared, "--coverage", "0.99"]
            rule = _run([*quick, "--edges", f"{folder}/rule.npz"])
            theirs = None
            if peer:
                theirs = _run([peer, str(HERE / "trace_peer.py"), folder, *shared, "--edges", f"{folder}/peer.npz"])
            _row(table, name, "ours, all", ours, theirs, _edge_difference(case) if theirs else "")
            _row(table, "", "ours, coverage 0.99", rule, theirs, _same_nodes(case, "ours", "rule"))
            if theirs:
                _row(table, "", "circuit-tracer", theirs, theirs, "")
    Console(width=140).print(table)


def _run(command: list[str]) -> Run:
    result, whole, peak_mb = measured(command)
    return Run(
        result["active"], result["kept_nodes"], median(result["attribution_seconds"]),
        median(result["pruning_seconds"]), whole, peak_mb,
    )  # fmt: skip


def measured(command: list[str]) -> tuple[dict, float, float]:
    """What a process printed as JSON in its last line, its seconds, and its peak memory in MB."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    whole = time.perf_counter() - start
    if status != 0:
        raise click.ClickException(f"{' '.join(command[:2])} ended with status {os.waitstatus_to_exitcode(status)}.")
    peak_mb = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return json.loads(output.strip().splitlines()[-1]), whole, peak_mb


def _row(table: Table, case: str, tracer: str, run: Run, peer: Run | None, agreement: str) -> None:
    ratio = f"{peer.attribution_seconds / run.attribution_seconds:.1f}×" if peer else ""
    table.add_row(
        case, f"{run.active:,}", tracer, f"{run.attribution_seconds:.3f}", f"{run.pruning_seconds:.3f}",
        f"{run.whole_seconds:.1f}", f"{run.peak_mb:,.0f}", ratio, agreement,
    )  # fmt: skip


def _edge_difference(case: Path) -> str:
    """Largest difference of an edge between active features, as a share of the largest edge."""
    ours, peer = np.load(case / "ours.npz"), np.load(case / "peer.npz")
    features = peer["features"]
    number = {tuple(row): i for i, row in enumerate(features.tolist())}
    nodes = ours["nodes"]
    # a pre-activation of 1e-8 may be active for one and not for the other
    column = np.array([number.get(tuple(n[1:]), -1) if n[0] == NodeKind.FEATURE else -1 for n in nodes.tolist()])
    one_sided = (nodes[:, 0] == NodeKind.FEATURE).sum() + len(features) - 2 * (column >= 0).sum()
    source, target = column[ours["source"]], column[ours["target"]]
    both = (source >= 0) & (target >= 0)
    dense = np.zeros((len(features), len(features)), dtype=np.float32)
    dense[target[both], source[both]] = ours["weight"][both]
    adjacency = peer["adjacency"][: len(features), : len(features)]
    worst = np.abs(dense - adjacency)[np.ix_(*2 * [column[column >= 0]])].max() / np.abs(peer["adjacency"]).max()
    return f"edges to {worst:.0e} of the largest; {one_sided} features in one only"


def _same_nodes(case: Path, one: str, other: str) -> str:
    """Jaccard index of the nodes two pruned graphs keep."""
    kept = [set(map(tuple, np.load(case / f"{name}.npz")["kept"].tolist())) for name in (one, other)]
    return f"nodes {len(kept[0] & kept[1]) / len(kept[0] | kept[1]):.3f} of ours, all"


if __name__ == "__main__":
    main()
