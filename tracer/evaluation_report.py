"""An evaluation as data, which is all that is printed or drawn, and as tables in a terminal."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from tracer.evaluation import Evaluation
from transcoders.comparison import Comparison
from transcoders.metrics import NORMS, POSITIONS
from transcoders.reconstruction import DENSITIES, Errors


def evaluation_record(done: Evaluation) -> dict[str, Any]:
    """All numbers as JSON takes them; null where there is none."""
    origin, config = done.replacement.origin, done.replacement.transcoder.config
    dead = (done.histogram[:, 0].double() / config.n_features).tolist()
    return {
        "model": origin.model, "model_revision": origin.model_revision,
        "transcoder": origin.transcoder, "transcoder_revision": origin.transcoder_revision,
        "data": done.material.name, "reads_last": done.material.reads_last,
        "n_layers": config.n_layers, "n_features": config.n_features, "cross_layer": config.cross_layer,
        "sequences": len(done.material.passages.tokens), "tokens": int(done.overall.tokens[0]),
        "answers": len(done.all_replaced.kl),
        **_means(done.overall), "dead": sum(dead) / len(dead), **_agreement(done.all_replaced),
        "layers": [
            {
                "layer": layer, **_of_layer(done.overall, layer), "dead": dead[layer],
                "density_histogram": done.histogram[layer].tolist(),
                "decoder_norms": [
                    float(norm) if layer <= target < layer + config.reach(layer) else None
                    for target, norm in enumerate(done.decoder_norms[layer])
                ],
                "alone": _agreement(done.alone[layer]), "up_to": _agreement(done.up_to[layer]),
            }
            for layer in range(config.n_layers)
        ],
        "by_norm": _bucket_records(NORMS, done.by_norm, done.answers_by_norm, config.n_layers),
        "by_position": _bucket_records(POSITIONS, done.by_position, done.answers_by_position, config.n_layers),
        "at_answer": None if done.last is None else _bucket_record(done.last, config.n_layers),
        "density_bounds": list(DENSITIES),
        "graphs": {
            "replacement": _mean([graph.replacement for graph in done.graphs]),
            "completeness": _mean([graph.completeness for graph in done.graphs]),
            "prompts": [
                vars(graph.asked) | {
                    "replacement": graph.replacement, "completeness": graph.completeness,
                    "active_features": graph.active_features,
                }
                for graph in done.graphs
            ],
        },
        "seconds": done.seconds,
    }  # fmt: skip


def bucket_names(bounds: Sequence[float]) -> list[str]:
    """What lies below the first bound, between each and the next, and above the last."""
    between = [f"{low:g} to <{high:g}" for low, high in pairwise(bounds)]
    return [f"<{bounds[0]:g}", *between, f"≥{bounds[-1]:g}"]


def evaluation_text(record: dict[str, Any]) -> str:
    """The numbers as tables for people."""
    graphs = record["graphs"]
    lines = [
        f"Model       {record['model']}, with {record['transcoder']}: {record['n_layers']} layers of "
        f"{record['n_features']} features",
        f"Data        {record['data']}: {record['tokens']:,} tokens in {record['sequences']:,} sequences, "
        f"{record['answers']:,} answers",
        f"Answers     top-1 match {share(record['top1_match'])}, KL {number(record['kl'])} nats, all MLPs replaced",
        f"Errors      NMSE {number(record['nmse'])}, relative error {number(record['relative_error'])} per token",
        f"Features    L0 {record['l0']:.1f} per token over all layers, {share(record['dead'])} never fire here",
    ]
    if graphs["prompts"]:
        lines.append(
            f"Graphs      replacement {graphs['replacement']:.3f}, completeness {graphs['completeness']:.3f}, "
            f"means of {len(graphs['prompts'])}"
        )
    return "\n\n".join(["\n".join(lines), _layer_table(record), _bucket_tables(record), *_prompt_table(record)])


def share(value: float | None) -> str:
    """As a percentage; nothing where there is none."""
    return "" if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    """With four decimals; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"


def _layer_table(record: dict[str, Any]) -> str:
    rows = [
        [
            str(one["layer"]), number(one["nmse"]), number(one["relative_error"]), f"{one['l0']:.1f}",
            share(one["dead"]), share(one["alone"]["top1_match"]), number(one["alone"]["kl"]),
            share(one["up_to"]["top1_match"]), number(one["up_to"]["kl"]),
        ]
        for one in record["layers"]
    ]  # fmt: skip
    columns = [
        "layer", "NMSE", "rel. error", "L0", "dead", "alone: top-1", "KL", "up to it: top-1", "KL",
    ]  # fmt: skip
    return _table("Layer by layer; replaced alone, and with all before it", columns, rows)


def _bucket_tables(record: dict[str, Any]) -> str:
    columns = ["", "share of tokens", "NMSE", "rel. error", "L0", "top-1", "KL"]
    norms, places = (
        [_bucket_row(one["name"], one, record) for one in record[part] if one["tokens"]]
        for part in ("by_norm", "by_position")
    )
    if record["at_answer"] is not None:
        answers = {"top1_match": record["top1_match"], "kl": record["kl"]}
        places.append(_bucket_row("last", record["at_answer"] | answers, record))
    return "\n\n".join(
        [
            _table("By norm of the MLP output, in root mean squares of its layer", columns, norms),
            _table("By position in the sequence", columns, places),
        ]
    )


def _bucket_row(name: str, bucket: dict[str, Any], record: dict[str, Any]) -> list[str]:
    part = bucket["tokens"] / (record["tokens"] * record["n_layers"])
    l0 = "" if bucket["l0"] is None else f"{bucket['l0']:.1f}"
    errors = [number(bucket["nmse"]), number(bucket["relative_error"]), l0]
    return [name, share(part), *errors, share(bucket["top1_match"]), number(bucket["kl"])]


def _prompt_table(record: dict[str, Any]) -> list[str]:
    prompts = record["graphs"]["prompts"]
    if not prompts:
        return []
    rows = [
        [
            one["prompt"], f"{one['answer'].strip()} {one['probability']:.1%}", one["replaced_answer"].strip(),
            number(one["kl"]), f"{one['replacement']:.3f}", f"{one['completeness']:.3f}", str(one["active_features"]),
        ]
        for one in prompts
    ]  # fmt: skip
    columns = ["prompt", "answer", "replaced", "KL", "replacement", "completeness", "features"]
    return [_table("Traced prompts", columns, rows, n_texts=3)]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, n_texts: int = 1) -> str:
    """A table as wide as it needs to be; its first columns are texts, the others numbers."""
    shown = Table(show_edge=False, header_style="")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i < n_texts else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=4000, file=io.StringIO(), markup=False, highlight=False)
    console.print(title)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def _of_layer(errors: Errors, layer: int) -> dict[str, float | None]:
    return {name: _finite(getattr(errors, name)[layer]) for name in ("nmse", "relative_error", "l0")}


def _bucket_records(
    bounds: Sequence[float], parts: Sequence[Errors], answers: Sequence[Comparison], n_layers: int
) -> list[dict[str, Any]]:
    return [
        {"name": name} | _bucket_record(errors, n_layers) | _agreement(compared)
        for name, errors, compared in zip(bucket_names(bounds), parts, answers, strict=True)
    ]


def _bucket_record(errors: Errors, n_layers: int) -> dict[str, Any]:
    """Means over layers, or over layers and tokens, then layer by layer."""
    return {"tokens": int(errors.tokens.sum()), **_means(errors)} | {
        "layers": [{"tokens": int(errors.tokens[i]), **_of_layer(errors, i)} for i in range(n_layers)]
    }


def _means(errors: Errors) -> dict[str, float | None]:
    """NMSE is the layers' mean, relative error that of all layers' tokens, and L0 the layers' sum."""
    some = errors.tokens > 0
    if not bool(some.any()):
        return {"nmse": None, "relative_error": None, "l0": None}
    weighted = (errors.relative_error * errors.tokens)[some].sum() / errors.tokens.sum()
    return {
        "nmse": _finite(errors.nmse[some].mean()), "relative_error": _finite(weighted),
        "l0": _finite(errors.l0.sum()),
    }  # fmt: skip


def _agreement(compared: Comparison) -> dict[str, float | None]:
    if len(compared.kl) == 0:
        return {"top1_match": None, "kl": None}
    return {"top1_match": compared.top1_match, "kl": compared.mean_kl}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _finite(value: Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None
