"""Trace one benchmark case with this package and print what it took, as JSON: a process of its own (attribution.py)."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import matrix_rate, now, peak_mb
from graphs import AttributionGraph, NodeKind, prune
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--edges", type=Path, help="Write nodes, edges and the nodes that pruning keeps here (.npz).")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompt = json.loads((options.case / "prompt.json").read_text())["prompt"]
    replacement = ReplacementModel.load(
        options.case / "model", options.case / "transcoder", device=options.device, dtype=getattr(torch, options.dtype)
    )

    def trace() -> AttributionGraph:
        local = replacement.localize(replacement.tokenize(prompt))
        targets = choose_targets(replacement, local, TraceConfig())
        return attribute(local, targets, coverage=options.coverage, max_features=options.max_features)

    attribution, pruning = [], []
    for _ in range(options.repeats):
        graph = pruned = None  # or the last one would count in the peak
        start = now(options.device)
        graph = trace()
        attribution.append(now(options.device) - start)
        start = time.perf_counter()
        pruned = prune(graph, node_threshold=0.8, edge_threshold=0.98)
        pruning.append(time.perf_counter() - start)
    if options.edges:
        np.savez(options.edges, **_edges(graph), kept=_names(pruned))
    described = {
        "active": int((graph.kind == NodeKind.FEATURE).sum()), "edges": len(graph.weight),
        "attribution_seconds": attribution, "pruning_seconds": pruning,
        "kept_nodes": len(pruned.kind), "coverage": graph.info.coverage, "row_share": graph.info.row_share,
        "conservation_error": graph.info.conservation_error, "logits_error": graph.info.logits_error,
        "peak_mb": peak_mb(options.device),
    }  # fmt: skip
    graph = pruned = None
    print(json.dumps(described | _use_of_the_machine(trace, options.device)))


def _use_of_the_machine(trace: Callable[[], AttributionGraph], device: str) -> dict[str, float]:
    """Operations of one more trace, what the device does a second, and what it took to find out.

    Weights may be narrower, but all products are float32.
    """
    start = now(device)
    in_place = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        trace()
    rate = matrix_rate(device, torch.float32)
    return {
        "operations": counter.get_total_flops(), "matrix_rate": rate, "measuring_seconds": now(device) - start
    }  # fmt: skip


def _product(onto: tuple, a: tuple, b: tuple, *rest: object, **options: object) -> int:
    """What torch's counter knows of products that make a new matrix only."""
    return 2 * math.prod(a) * b[-1]


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
