"""What the commands do and print, apart from their options."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from graphs import AttributionGraph, GraphError, GraphStore, NodeKind, graph_id_of, logit_weights
from tracer import lab
from tracer.config import TraceConfig
from tracer.loading import Source, load, save_features, share_threads
from tracer.options import DEFAULT_STORE, place
from tracer.story import feature_paths, path_record, place_text, routes, target_name, target_record, told_targets
from tracer.tables import on_one_line

N_JSON_PATHS = 10
N_ROUTES = 6


@dataclass(frozen=True)
class Printed:
    """What a trace printed, and the graph it saved."""

    text: str
    graph_id: str
    doubt: str
    """What speaks against the graph, for stderr; "" where nothing does."""


def trace_and_save(prompt: str, store: GraphStore, config: TraceConfig, source: Source, *, as_json: bool) -> Printed:
    """Trace a prompt with the named model, or the bundled one, and save the graph and what its features are about."""
    if source.model is None:
        lab.check_words(prompt, lab.words())
    with progress() as step:
        step("loading the model", 0, 0)
        from tracer.memory import SAVE_LESS, TELL_LESS, explaining_lack_of_memory
        from tracer.pipeline import trace  # and with it torch
    loaded = load(source)  # downloads have their own bars
    share_threads(loaded)
    with progress() as step:
        done = trace(
            prompt, loaded.replacement, config, labels=loaded.labels,
            on_progress=lambda n, total: step("attributing features", n, total),
        )  # fmt: skip
    save_features(store, loaded)
    predictions = [vars(prediction) for prediction in done.predictions]
    with explaining_lack_of_memory(SAVE_LESS):
        graph_id = store.save(_with_tags_of_before(done.graph, store))
    with explaining_lack_of_memory(TELL_LESS.format(graph_id=graph_id)):
        record: dict[str, Any] = graph_record(graph_id, store, done.graph) | {"predictions": predictions}
    counts = record["counts"] | {"nodes": done.n_nodes, "edges": done.n_edges}
    record["doubt"] = done.doubt or None
    record["counts"] = counts | {"pruned_nodes": done.graph.n_nodes, "pruned_edges": done.graph.n_edges}
    text = json.dumps(record, ensure_ascii=False, indent=2) if as_json else _text(record, done.graph)
    return Printed(text, graph_id, done.doubt)


def convert_transcoder(source: str, folder: Path, dtype: str | None, overrides: dict[str, str]) -> str:
    """Convert a transcoder, and say what was found, what was changed and where it was written."""
    import torch

    from tracer.memory import explaining_lack_of_memory
    from transcoders import convert, open_stored

    with explaining_lack_of_memory("convert it on a machine with more of it"), progress() as step:
        stored = open_stored(source, **overrides)
        convert(
            stored, folder, dtype=getattr(torch, dtype) if dtype else None,
            on_layer=lambda done, total: step("converting layers", done, total),
        )  # fmt: skip
    config = stored.config
    kind = "cross-layer" if config.cross_layer else "per-layer"
    skip = ", skip connections" if config.skip else ""
    written = dtype or str(stored.dtype).removeprefix("torch.")
    return "\n".join(
        [
            f"Found    {stored.layout}: a {kind} transcoder{skip}, {config.activation}, {config.n_layers} layers of "
            f"{config.n_features} features, width {config.d_model}",
            f"Hooks    {config.reads} → {config.writes}",
            f"Folded   {'; '.join(stored.folded) or 'nothing'}",
            f"Wrote    {folder} ({written})",
        ]
    )


def show_graph(store: GraphStore, graph_id: str, *, as_json: bool) -> str:
    """A saved graph, as `trace` prints it."""
    graph = store.load(graph_id)
    record = graph_record(graph_id, store, graph)
    return json.dumps(record, ensure_ascii=False, indent=2) if as_json else _text(record, graph)


def _with_tags_of_before(graph: AttributionGraph, store: GraphStore) -> AttributionGraph:
    """A batch may have tagged the graph that this one replaces; a prompt alone says nothing about tags."""
    before = None
    with suppress(GraphError):  # packs that cannot be read are no reason to lose what was traced
        before = store.find(graph_id_of(graph.info))
    return graph if before is None else replace(graph, info=replace(graph.info, tags=before.info.tags))


def graph_record(graph_id: str, store: GraphStore, graph: AttributionGraph) -> dict:
    """A graph as data, for --json; the model's predictions are those among the targets."""
    info = graph.info
    targets = [target_record(graph, node) for node in np.flatnonzero(graph.kind == NodeKind.LOGIT).tolist()]
    targets.sort(key=lambda target: -target["weight"])
    told = told_targets(graph)
    return {
        "graph_id": graph_id,
        "store": place(store),
        "prompt": info.prompt,
        "tokens": list(info.tokens),
        "predictions": [
            {"token": one["name"], "token_id": one["token_id"], "probability": one["weight"],
             "position": one["position"]}
            for one in targets if one["token_id"] is not None
        ],
        "targets": targets,
        "scores": {
            "replacement": info.replacement_score, "completeness": info.completeness_score,
            "pruned_replacement": info.pruned_replacement_score,
            "pruned_completeness": info.pruned_completeness_score,
        },
        "counts": {"active_features": info.n_active_features, "nodes": graph.n_nodes, "edges": graph.n_edges},
        "coverage": info.coverage,
        "row_share": info.row_share,
        "skipped_influence": info.skipped_influence,
        "conservation_error": info.conservation_error,
        "logits_error": info.logits_error,
        "seconds": info.seconds,
        "paths": [
            path_record(graph, path) for target in told for path in feature_paths(graph, target, N_JSON_PATHS)
        ],
        "routes": [
            {"target": target, "share": route.share, "steps": list(route.steps), "n_paths": route.n_paths}
            for target in told for route in routes(graph, target, N_ROUTES // len(told))
        ],
        "commands": _commands(place(store), graph),
    }  # fmt: skip


def compact_store(store: GraphStore) -> str:
    """Compact the store, and say what came of it."""
    with progress() as step:
        done = store.compact(on_progress=lambda n, total: step("compacting graphs", n, total))
    per_edge = f", {done.n_bytes / done.n_edges:.1f} bytes per edge" if done.n_edges else ""
    lines = [
        f"Moved    {done.n_moved} graphs into packs",
        f"Packed   {done.n_graphs} graphs with {done.n_edges} edges in {done.n_bytes / 1e6:.1f} MB{per_edge}",
        *(f"Left     {graph_id}: {reason}" for graph_id, reason in done.damaged.items()),
    ]
    return "\n".join(lines)


def _scores(replacement: float | None, completeness: float | None) -> str:
    """A graph made in Python need not have any."""
    if replacement is None or completeness is None:
        return "not computed"
    return f"replacement {replacement:.2f}, completeness {completeness:.2f}"


def _text(record: dict, graph: AttributionGraph) -> str:
    """The circuit as a person would tell it."""
    scores, counts = record["scores"], record["counts"]
    skipped = record["skipped_influence"] / max(logit_weights(graph).sum(), np.finfo(np.float64).tiny)
    lines = [
        f"Prompt   {on_one_line(record['prompt'])}",
        f"Tokens   {' '.join(token.strip() for token in record['tokens'])}",
        *_answers(record, graph),
        *_explained(record, graph),
        "",
        *_circuit(record["routes"], graph),
    ]
    whole = f"{counts['active_features']} active features"
    if "pruned_nodes" in counts:
        whole += (
            f"; {counts['nodes']} nodes and {counts['edges']} edges, of which {graph.n_nodes} and {graph.n_edges} kept"
        )
    else:
        whole += f"; {graph.n_nodes} nodes and {graph.n_edges} edges kept"
    lines += ["", f"Graph    {whole}"]
    lines.append(f"Scores   {_scores(scores['replacement'], scores['completeness'])}")
    if scores["pruned_replacement"] is not None:
        lines[-1] += f"; after pruning {_scores(scores['pruned_replacement'], scores['pruned_completeness'])}"
    if np.isnan(graph.pre_activation).all():
        lines.append(
            "Checked  nothing: the graph was imported, and its file has no biases; its scores are those of the file"
        )
    else:
        lines.append(
            f"Checked  edges + bias = pre-activation to {record['conservation_error']:.0e}; logits reproduced to "
            f"{record['logits_error']:.0e}; at most {skipped:.2%} of the influence was skipped"
        )
    if record["row_share"] < 1:
        lines.append(f"Left out of each target's inputs the smallest, which hold {1 - record['row_share']:.2%} at most")
    lines.append(f"Saved    {record['graph_id']} in {record['store']} ({record['seconds']:.2f} s)")
    heading = "Look closer:  "
    lines += ["", heading + f"\n{' ' * len(heading)}".join(record["commands"])]
    return "\n".join(lines)


def _answers(record: dict, graph: AttributionGraph) -> list[str]:
    """The most probable next tokens, for each place where some are known."""
    lines, last = [], len(record["tokens"]) - 1
    for position in sorted({one["position"] for one in record["predictions"]}):
        here = [one for one in record["predictions"] if one["position"] == position][:5]
        place = "" if position == last else f"after {place_text(graph.info, position)}: "
        said = "   ".join(f"{one['token'].strip()} {one['probability']:.1%}" for one in here)
        lines.append(f"Answer   {place}{said}")
    return lines


def _explained(record: dict, graph: AttributionGraph) -> list[str]:
    """What is explained, unless that is just the answer."""
    answers = {(one["token_id"], one["position"]) for one in record["predictions"]}
    if all((one["token_id"], one["position"]) in answers for one in record["targets"]):
        return []
    names = [target_name(graph, one["node"]) for one in record["targets"]]
    return ["Explains " + "   ".join(names[:10]) + (f"   and {len(names) - 10} more" if len(names) > 10 else "")]


def _circuit(found: list[dict], graph: AttributionGraph) -> list[str]:
    """The strongest ways to the targets of most weight."""
    end = "the answer" if (graph.token_id[told_targets(graph)] >= 0).all() else "what is explained"
    lines = [f"Circuit  strongest ways from the words to {end}, with their share of its input"]
    lines += [f"  {route['share']:6.1%}  " + " → ".join(route["steps"]) for route in found]
    return lines if found else [*lines, "  none passes through a feature that was kept"]


def _commands(store: str, graph: AttributionGraph) -> list[str]:
    """What to type to look closer."""
    where = "" if store == DEFAULT_STORE else f" {shlex.quote(store)}"
    return [f"trace view{where}", f'trace sql{where} "{_example_query(graph)}"']


def _example_query(graph: AttributionGraph) -> str:
    """A path query from the word that is one end of the strongest path."""
    paths = [path for target in told_targets(graph) for path in feature_paths(graph, target, 1)]
    word = str(graph.word[paths[0].nodes[0]]) if paths else ""
    return f"FROM strongest_circuit('{word}')" if word.isalnum() else "FROM graphs"


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr that leaves nothing behind; silent where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def step(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total or None)

        yield step
