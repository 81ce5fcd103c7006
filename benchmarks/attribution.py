"""Time and memory of attribution over tokens, layers, width and features; the peer's beside it where it is installed.

    python -m benchmarks.attribution                                  # this package
    python -m benchmarks.attribution --peer ~/peer/bin/python         # and circuit-tracer, from its own environment
    python -m benchmarks.attribution --shape llama-1b --device cuda --dtype bfloat16 --features 32768

Every number comes from processes of their own on the same files: medians over `--processes` of them, and of attribution
and pruning over the repeats inside each. Ratios are the peer's seconds of attribution, of pruning and of the whole
process, and its peak memory, by ours; nodes are compared by the Jaccard index of what two pruned graphs keep.
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

from benchmarks.random_case import GEMMA_2B, LLAMA_1B, Case, write_case
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
SHAPES = {"llama-1b": LLAMA_1B, "gemma-2b": GEMMA_2B}


@dataclass(frozen=True)
class Run:
    """What a process took; of several the medians."""

    active: int
    attribution_seconds: float
    pruning_seconds: float
    whole_seconds: float
    peak_mb: float
    """Of the GPU where the process used one."""
    of_matrix_rate: float | None
    """Operations a second as a share of what the device does in large matrix products; not known of the peer."""


@click.command()
@click.option("--peer", type=click.Path(exists=True, dir_okay=False), help="Python that has circuit-tracer.")
@click.option("--peer-batch-size", default=256, show_default=True, help="Rows at once; 64 is its quickest on CPUs.")
@click.option("--only", multiple=True, type=click.Choice(list(SWEEP)), help="Run these cases only.")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Run a model of this shape instead.")
@click.option("--layers", type=int, help="Of the shape, another number.")
@click.option("--features", type=int, help="A layer; of the shape, another number.")
@click.option("--l0", type=int, help="Active features a layer and position; of the shape, another number.")
@click.option("--tokens", type=int, help="Of the shape, another number.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--repeats", default=3, show_default=True)
@click.option("--processes", default=1, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    peer: str | None, peer_batch_size: int, only: tuple[str, ...], shape: str | None, layers: int | None,
    features: int | None, l0: int | None, tokens: int | None, device: str, dtype: str, repeats: int, processes: int,
    threads: int,
) -> None:  # fmt: skip
    """Print a table: ours with everything attributed, ours by the coverage rule, and the peer's."""
    changes = {"n_layers": layers, "n_features": features, "l0": l0, "n_tokens": tokens}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes and shape is None:
        raise click.UsageError("--layers, --features, --l0 and --tokens change a shape; name one with --shape.")
    cases = {shape: replace(SHAPES[shape], **changes)} if shape else {name: SWEEP[name] for name in only or SWEEP}
    if peer and any(case.family != "llama" for case in cases.values()):
        raise click.UsageError("trace_peer.py gives circuit-tracer local Llamas only; leave --peer out for this shape.")
    shared = [f"--repeats={repeats}", f"--threads={threads}", f"--device={device}", f"--dtype={dtype}"]
    table = Table(
        "case", "active", "tracer", "attribution s", "pruning s", "whole s", "peak MB", "of matrix rate",
        "attribution ×", "pruning ×", "whole ×", "memory ×", "agreement",
    )  # fmt: skip
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            write_case(replace(case, dtype=dtype), Path(folder))
            command = [peer, str(HERE / "trace_peer.py"), f"--batch-size={peer_batch_size}"] if peer else []
            _add_case(table, name, Path(folder), command, shared, processes)
    Console(width=200).print(table)


def _add_case(table: Table, name: str, folder: Path, peer: list[str], shared: list[str], processes: int) -> None:
    """`peer` is the command that runs it, or nothing."""
    ours, rule = (
        _run([sys.executable, str(HERE / "trace_ours.py"), str(folder), *shared, *more], processes)
        for more in (
            [f"--edges={folder}/ours.npz"],
            ["--coverage=0.99", f"--edges={folder}/rule.npz"],
        )
    )
    theirs, edges, same = None, "", ""
    if peer:
        theirs = _run([*peer, str(folder), *shared, f"--edges={folder}/peer.npz"], processes)
        kept = _kept_by_peer(folder)
        edges = f"{_edge_difference(folder)}; nodes {_jaccard(_kept(folder, 'ours'), kept):.3f} of the peer's"
        same = f", {_jaccard(_kept(folder, 'rule'), kept):.3f} of the peer's"
    _row(table, name, "ours, all", ours, theirs, edges)
    alike = _jaccard(_kept(folder, "ours"), _kept(folder, "rule"))
    _row(table, "", "ours, coverage 0.99", rule, theirs, f"nodes {alike:.3f} of ours, all{same}")
    if theirs:
        _row(table, "", "circuit-tracer", theirs, theirs, "")


def _run(command: list[str], processes: int) -> Run:
    runs = [_run_once(command) for _ in range(processes)]
    columns = zip(*(vars(run).values() for run in runs), strict=True)
    return Run(*(None if None in column else median(column) for column in columns))


def _run_once(command: list[str]) -> Run:
    result, whole = measured(command)
    seconds = median(result["attribution_seconds"])
    share = result["operations"] / seconds / result["matrix_rate"] if "operations" in result else None
    return Run(
        result["active"], seconds, median(result["pruning_seconds"]), whole - result.get("measuring_seconds", 0),
        result["peak_mb"], share,
    )  # fmt: skip


def measured(command: list[str]) -> tuple[dict, float]:
    """What a process printed as JSON in its last line, and its seconds."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    start = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=False)
    whole = time.perf_counter() - start
    if process.returncode != 0:
        raise click.ClickException(f"{' '.join(command[:2])} ended with status {process.returncode}.")
    return json.loads(process.stdout.strip().splitlines()[-1]), whole


def _row(table: Table, case: str, tracer: str, run: Run, peer: Run | None, agreement: str) -> None:
    ratios = [""] * 4
    if peer:
        fields = ("attribution_seconds", "pruning_seconds", "whole_seconds", "peak_mb")
        ratios = [f"{getattr(peer, field) / getattr(run, field):.1f}" for field in fields]
    table.add_row(
        case, f"{run.active:,}", tracer, f"{run.attribution_seconds:.3f}", f"{run.pruning_seconds:.3f}",
        f"{run.whole_seconds:.1f}", f"{run.peak_mb:,.0f}",
        "" if run.of_matrix_rate is None else f"{run.of_matrix_rate:.0%}", *ratios, agreement,
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


def _kept(case: Path, name: str) -> set[tuple[int, ...]]:
    """What our pruned graph keeps: kind, layer, position and feature of each node but the logits."""
    return set(map(tuple, np.load(case / f"{name}.npz")["kept"].tolist()))


def _kept_by_peer(case: Path) -> set[tuple[int, ...]]:
    """The same of the peer, whose nodes are all active features, then errors by layer and position, tokens, logits."""
    peer = np.load(case / "peer.npz")
    features, mask, n_layers = peer["features"], peer["kept"], int(peer["n_layers"])
    n_positions = (len(mask) - len(features) - int(peer["n_logits"])) // (n_layers + 1)
    names = [(int(NodeKind.FEATURE), *row) for row in features.tolist()]
    names += [(int(NodeKind.ERROR), layer, p, -1) for layer in range(n_layers) for p in range(n_positions)]
    names += [(int(NodeKind.TOKEN), -1, p, -1) for p in range(n_positions)]
    return {name for name, kept in zip(names, mask[: len(names)].tolist(), strict=True) if kept}


def _jaccard(one: set[tuple[int, ...]], other: set[tuple[int, ...]]) -> float:
    return len(one & other) / len(one | other)


if __name__ == "__main__":
    main()
