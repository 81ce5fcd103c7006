"""Import circuit-tracer graph JSON of millions of links: time and memory, then SQL, the viewer's pages, and export.

python -m benchmarks.exchange --folder /tmp/exchange --edges 320000
python -m benchmarks.exchange --folder /tmp/exchange                  # 16 million links, 1.7 GB; needs 4 GB of disk
"""

import argparse
import json
import os
import shutil
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

N_LAYERS, N_TOKENS, N_FEATURES = 26, 73, 16_384
COUNTS = "SELECT count(*) AS edges, sum(abs(weight)) AS strength FROM edges"
STRONGEST = """
SELECT n.layer, n.feature, sum(abs(e.weight)) AS strength FROM edges AS e
JOIN nodes AS n ON n.graph_id = e.graph_id AND n.node = e.source
WHERE n.kind = 'feature' GROUP BY ALL ORDER BY strength DESC LIMIT 20
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the file and the store are made")
    parser.add_argument("--edges", type=int, default=16_000_000)
    parser.add_argument(
        "--keep", action="store_true", help="do not delete the folder afterwards; a file in it is used again"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path, store = options.folder / "large.json", options.folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    if not path.exists():
        print(
            f"generated in {generate(path, options.edges):.0f} s: {path.stat().st_size / 1e9:.3f} GB", file=sys.stderr
        )
    print("| step | s | peak MB |\n|---|---|---|")
    report("import into the store", import_file, path, store)
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    graph_id = next((store / "graphs").iterdir()).name
    report("count and sum of all edges in SQL", ask, store, COUNTS)
    report("the 20 features that send most, in SQL", ask, store, STRONGEST)
    report("the viewer's page, the graph's JSON, then a node's", open_in_viewer, store, graph_id)
    report("export as JSON", export_file, store, graph_id, options.folder / "again.json")
    megabytes = path.stat().st_size / 1e6
    print(f"\nStore {size / 1e6:.0f} MB, {size / options.edges:.1f} bytes per edge; JSON {megabytes:.0f} MB")
    if not options.keep:
        shutil.rmtree(options.folder)


def report(name: str, work: Any, *arguments: Any) -> None:
    """Run the work in a process of its own, which begins empty, and print its time and its peak memory."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, *arguments))
    process.start()
    seconds, peak, note = receiver.recv()
    process.join()
    print(f"| {name}{note} | {seconds} | {peak:,.0f} |", flush=True)


def generate(path: Path, n_edges: int) -> float:
    """Write a graph as circuit-tracer does, with its layout of lines; the seconds it took."""
    start = time.perf_counter()
    random = np.random.default_rng(0)
    # about a fifth of all pairs of nodes in different layers are links
    count = max(int((n_edges / 0.2) ** 0.5), 200)
    layer = np.sort(random.integers(0, N_LAYERS, count))
    feature = random.permutation(N_FEATURES * N_TOKENS)[:count]
    position, number = feature % N_TOKENS, feature // N_TOKENS
    rows = sorted(zip(layer.tolist(), position.tolist(), number.tolist(), strict=True))
    nodes = [_feature(*row, random.random()) for row in rows]
    errors = [
        _node(f"{a}_-1_{p}", -1, str(a), p, "mlp reconstruction error")
        for a in range(N_LAYERS)
        for p in range(N_TOKENS)
    ]
    tokens = [_node(f"E_{p + 100}_{p}", p, "E", p, "embedding") for p in range(N_TOKENS)]
    logits = [_logit(vocabulary) for vocabulary in range(10)]
    sources = nodes + errors + tokens
    level = np.array([-1 if node["layer"] == "E" else int(node["layer"]) for node in sources])
    targets = nodes + logits
    possible = np.array([(level < int(node["layer"])).sum() for node in targets])
    wanted = random.multinomial(n_edges, possible / possible.sum())
    metadata = {
        "slug": "large", "scan": "random", "transcoder_list": [], "prompt": "".join(f" t{p}" for p in range(N_TOKENS)),
        "prompt_tokens": [f" t{p}" for p in range(N_TOKENS)], "node_threshold": 0.8, "schema_version": 1,
    }  # fmt: skip
    view = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{\n  "metadata": {json.dumps(metadata)},\n  "qParams": {json.dumps(view)},\n  "nodes": ')
        file.write(json.dumps(sources + logits, indent=2) + ',\n  "links": [\n')
        comma = ""
        for node, n in zip(targets, wanted.tolist(), strict=True):
            able = np.flatnonzero(level < int(node["layer"]))
            chosen = np.sort(random.permutation(able)[:n]).tolist()
            weights = random.standard_normal(len(chosen), np.float32).astype(float).tolist()
            text = ",\n".join(
                f'    {{\n      "source": "{sources[source]["node_id"]}",\n      "target": "{node["node_id"]}",\n'
                f'      "weight": {weight}\n    }}'
                for source, weight in zip(chosen, weights, strict=True)
            )
            file.write(comma + text if text else "")
            comma = ",\n" if text or comma else ""
        file.write("\n  ]\n}\n")
    return time.perf_counter() - start


def import_file(path: Path, store: Path) -> str:
    from graphs import GraphStore
    from tracer.exchange import Wanted
    from tracer.exchange import import_file as run

    return run(GraphStore(store), path, Wanted()).split(":")[-1]


def ask(store: Path, query: str) -> str:
    from graphs import GraphStore

    assert GraphStore(store).sql(query).num_rows > 0
    return ""


def open_in_viewer(store: Path, graph_id: str) -> list[float]:
    from graphs import GraphStore
    from viewer.app import create_app

    client = create_app(GraphStore(store)).test_client()
    seconds = []
    for address in (f"/g/{graph_id}", f"/api/graphs/{graph_id}", f"/api/graphs/{graph_id}/nodes/100"):
        start = time.perf_counter()
        answer = client.get(address)
        assert answer.status_code == 200, answer.status
        seconds.append(time.perf_counter() - start)
    return seconds


def export_file(store: Path, graph_id: str, path: Path) -> str:
    from graphs import GraphStore
    from tracer.exchange import export_graph

    export_graph(GraphStore(store), graph_id, path, None, None)
    return ""


def _measured(sender: Any, work: Any, *arguments: Any) -> None:
    import resource

    start = time.perf_counter()
    note = work(*arguments)
    seconds = f"{time.perf_counter() - start:.1f}"
    if isinstance(note, list):
        seconds, note = ", ".join(f"{one:.1f}" for one in note), ""
    sender.send(
        (seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, f" ({note.strip()})" if note else "")
    )


def _node(node_id: str, feature: int, layer: str, position: int, kind: str) -> dict[str, Any]:
    return {
        "node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": position, "feature_type": kind,
        "token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"{node_id}-0",
        "clerp": "", "influence": None, "activation": None,
    }  # fmt: skip


def _feature(layer: int, position: int, number: int, activation: float) -> dict[str, Any]:
    paired = (layer + number) * (layer + number + 1) // 2 + number
    node = _node(f"{layer}_{number}_{position}", paired, str(layer), position, "cross layer transcoder")
    return node | {"activation": activation}


def _logit(vocabulary: int) -> dict[str, Any]:
    node = _node(f"{N_LAYERS + 1}_{vocabulary}_{N_TOKENS - 1}", vocabulary, str(N_LAYERS + 1), N_TOKENS - 1, "logit")
    text = f'Output "t{vocabulary}" (p=0.100)'
    return node | {"token_prob": 0.1, "is_target_logit": vocabulary == 0, "clerp": text}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
