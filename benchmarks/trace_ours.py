"""Trace one benchmark case with this package and print what it took, as JSON: a process of its own (attribution.py)."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from graphs import NodeKind, prune
from tracer.attribution import attribute
from tracer.config import TraceConfig
from tracer.pipeline import choose_targets
from tracer.replacement import ReplacementModel


def main() -> None:
    """Load, attribute `--repeats` times, prune, and describe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("--coverage", type=float, default=1.0)
    parser.add_argument("--max-features", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--edges", type=Path, help="Write nodes, edges and the nodes that pruning keeps here (.npz).")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompt = json.loads((options.case / "prompt.json").read_text())["prompt"]
    replacement = ReplacementModel.load(
        options.case / "model", options.case / "transcoder", dtype=getattr(torch, options.dtype)
    )
    attribution, pruning = [], []
    for _ in range(options.repeats):
        local = graph = pruned = None  # or the last one would count in the peak
        start = time.perf_counter()
        local = replacement.localize(replacement.tokenize(prompt))
        graph = attribute(
            local, choose_targets(replacement, local, TraceConfig()), coverage=options.coverage,
            max_features=options.max_features,
        )  # fmt: skip
        attribution.append(time.perf_counter() - start)
        start = time.perf_counter()
        pruned = prune(graph, node_threshold=0.8, edge_threshold=0.98)
        pruning.append(time.perf_counter() - start)
    if options.edges:
        np.savez(options.edges, **_edges(graph), kept=_names(pruned))
    print(
        json.dumps(
            {
                "active": int((graph.kind == NodeKind.FEATURE).sum()), "edges": len(graph.weight),
                "attribution_seconds": attribution, "pruning_seconds": pruning,
                "kept_nodes": len(pruned.kind), "coverage": graph.info.coverage, "row_share": graph.info.row_share,
                "conservation_error": graph.info.conservation_error,
            }
        )
    )  # fmt: skip


def _names(graph) -> np.ndarray:
    """Every node but the logits as (kind, layer, position, feature)."""
    columns = np.stack([graph.kind.astype(np.int64), graph.layer, graph.position, graph.feature], axis=1)
    return columns[graph.kind != NodeKind.LOGIT]


def _edges(graph) -> dict[str, np.ndarray]:
    return {
        "nodes": np.stack([graph.kind.astype(np.int64), graph.layer, graph.position, graph.feature], axis=1),
        "source": graph.source, "target": graph.target, "weight": graph.weight,
    }  # fmt: skip


if __name__ == "__main__":
    main()
