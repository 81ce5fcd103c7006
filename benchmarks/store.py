"""A store of thousands of graphs, in folders and compacted: sizes, times of queries, the same as JSON; and lab graphs.

    python -m benchmarks.store                                        # 10,000 generated graphs, about 15 minutes
    python -m benchmarks.store --graphs 1000 --folder /tmp/graphs     # keeps them; what is there is not made again
    python -m benchmarks.store --folder /tmp/graphs --step make --step before   # in pieces

Times are medians in one process with a fresh `GraphStore` each, so that nothing is remembered but what the
operating system keeps of files; `trace list` is a whole process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.batch import lab_rows
from benchmarks.made_graphs import CITIES, made_graph, prompts
from graphs import AttributionGraph, GraphStore, NodeKind
from tracer.batch import Job
from tracer.config import TraceConfig
from tracer.loading import Source
from tracer.processes import trace_in_processes

STEPS = ("make", "before", "compact", "after", "json", "lab")
QUERIES = {
    "20 features most often on a path from a city to the top logit": "FROM common_features($cities, 20)",
    "count and mean of all edges": "SELECT count(*) AS n, avg(abs(weight)) AS mean FROM edges",
    "edges and their sum per graph": "SELECT graph_id, count(*) AS n, sum(weight) AS total FROM edges GROUP BY 1",
    "edges and their mean per target": "SELECT target, count(*) AS n, avg(weight) AS mean FROM edges GROUP BY 1",
    "nodes and influence per kind": "SELECT kind, count(*) AS n, sum(influence) AS influence FROM nodes GROUP BY 1",
    "edges per kind of source (a join)": (
        "SELECT n.kind, count(*) AS n FROM edges AS e JOIN nodes AS n ON n.graph_id = e.graph_id AND n.node = e.source "
        "GROUP BY 1"
    ),
}
N_JSON, N_LAB = 100, 200


@click.command()
@click.option("--graphs", "count", default=10_000, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the store here.  [default: a temporary folder]")
@click.option("--repeats", default=3, show_default=True, help="Of which the median is told.")
@click.option("--step", "steps", multiple=True, type=click.Choice(STEPS), help="Only these; repeatable.")
def main(count: int, folder: Path | None, repeats: int, steps: tuple[str, ...]) -> None:
    """Make a store of generated graphs, and measure it before and after compaction."""
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        store = GraphStore(Path(place) / "store")
        table = Table("what", "when", "value", title=f"{count:,} graphs")
        for step in steps or STEPS:
            match step:
                case "make":
                    _make(store, count)
                case "before" | "after":
                    _measure(store.folder, step, repeats, table)
                case "compact":
                    seconds = _seconds(lambda: print(store.compact()))
                    _tell(table, "compaction", "", f"{seconds:.1f} s")
                case "json":
                    _compare_with_json(store, Path(place), table)
                case "lab":
                    lab = _trace_lab_prompts(Path(place) / "lab")
                    _measure(lab.folder, "lab before", repeats, table)
                    lab.compact()
                    _measure(lab.folder, "lab after", repeats, table)
        Console(width=120).print(table)


def _make(store: GraphStore, count: int) -> None:
    chosen = prompts(count)
    for prompt, number in track(chosen[len(store.ids()) :], description="saving graphs", console=Console(stderr=True)):
        store.save(made_graph(prompt, number))


def _trace_lab_prompts(folder: Path) -> GraphStore:
    job = Job(folder, Source(device="cpu"), TraceConfig())
    for _ in track(
        trace_in_processes(job, lab_rows(N_LAB), ["cpu"]), "tracing", N_LAB, console=Console(stderr=True)
    ):  # fmt: skip
        pass
    return GraphStore(folder)


def _measure(folder: Path, when: str, repeats: int, table: Table) -> None:
    n_edges = GraphStore(folder).sql("SELECT sum(n_edges) AS n FROM graphs")["n"][0].as_py()
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _tell(table, "size", when, f"{n_bytes / 1e6:,.0f} MB, {n_bytes / n_edges:.2f} bytes per edge ({n_edges:,} edges)")
    for name, sql in QUERIES.items():
        parameters = {"cities": list(CITIES)} if "$cities" in sql else {}
        _tell(table, name, when, _shown(repeats, lambda: GraphStore(folder).sql(sql, **parameters)))  # noqa: B023
    ids = GraphStore(folder).ids()
    chosen = np.random.default_rng(0).choice(ids, 9)
    times = [_seconds(lambda: GraphStore(folder).load(graph_id)) for graph_id in chosen]  # noqa: B023
    _tell(table, "open one graph", when, f"{median(times) * 1000:.0f} ms, at most {max(times) * 1000:.0f}")
    _tell(table, "GraphStore.list()", when, _shown(repeats, lambda: GraphStore(folder).list()))
    _tell(table, "trace list", when, _shown(repeats, lambda: _run("list", str(folder))))
    _tell(
        table,
        "trace sql: count of all edges",
        when,
        _shown(repeats, lambda: _run("sql", str(folder), QUERIES["count and mean of all edges"])),
    )


def _tell(table: Table, *cells: str) -> None:
    """A row of the table, and at once a line on stderr: some take minutes."""
    print(" | ".join(cells), file=sys.stderr, flush=True)
    table.add_row(*cells)


def _run(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-m", "tracer", *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)


def _compare_with_json(store: GraphStore, folder: Path, table: Table) -> None:
    chosen = np.random.default_rng(1).choice(store.ids(), N_JSON, replace=False).tolist()
    n_edges, n_bytes, opened, loaded = 0, 0, [], []
    for graph_id in chosen:
        opened.append(_seconds(lambda: store.load(graph_id)))  # noqa: B023
        graph = store.load(graph_id)
        path = folder / "graph.json"
        path.write_text(json.dumps(_as_json(graph)), encoding="utf-8")
        n_bytes, n_edges = n_bytes + path.stat().st_size, n_edges + graph.n_edges
        loaded.append(_seconds(lambda: json.loads(path.read_text("utf-8"))))  # noqa: B023
        path.unlink()
    _tell(table, "the same graphs as JSON", "", f"{n_bytes / n_edges:.1f} bytes per edge, {len(chosen)} graphs")
    _tell(table, "json.load of one graph", "", f"{median(loaded) * 1000:.1f} ms")
    _tell(table, "GraphStore.load of one graph, checked", "", f"{median(opened) * 1000:.1f} ms")


def _as_json(graph: AttributionGraph) -> dict:
    """In the layout of circuit-tracer's graph files."""
    kinds = {
        NodeKind.TOKEN: "embedding", NodeKind.FEATURE: "cross layer transcoder",
        NodeKind.ERROR: "mlp reconstruction error", NodeKind.LOGIT: "logit",
    }  # fmt: skip
    names = [
        f"{graph.layer[i]}_{graph.feature[i]}_{graph.position[i]}_{graph.kind[i]}_{graph.token_id[i]}"
        for i in range(graph.n_nodes)
    ]
    nodes = [
        {
            "node_id": names[i], "feature": int(graph.feature[i]), "layer": str(graph.layer[i]),
            "ctx_idx": int(graph.position[i]), "feature_type": kinds[NodeKind(graph.kind[i])],
            "token_prob": float(np.nan_to_num(graph.probability[i])), "is_target_logit": False, "run_idx": 0,
            "reverse_ctx_idx": 0, "jsNodeId": f"{names[i]}-0", "clerp": str(graph.label[i]),
            "influence": float(graph.cumulative_influence[i]), "activation": float(graph.activation[i]),
        }
        for i in range(graph.n_nodes)
    ]  # fmt: skip
    edges = zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
    links = [{"source": names[source], "target": names[target], "weight": weight} for source, target, weight in edges]
    info = graph.info
    metadata = {"slug": "graph", "scan": info.model, "prompt_tokens": list(info.tokens), "prompt": info.prompt}
    return {"metadata": metadata, "qParams": {}, "nodes": nodes, "links": links}


def _shown(repeats: int, act: Callable[[], object]) -> str:
    return f"{median(_seconds(act) for _ in range(repeats)):.2f} s"


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
