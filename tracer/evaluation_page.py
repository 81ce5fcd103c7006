"""An evaluation as one page: all of it in one file, no scripts, light and dark, for wide and narrow windows."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from tracer.charts import bars, heat_table, lines, numbered, table
from tracer.evaluation_report import number, share

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def evaluation_page(record: dict[str, Any]) -> str:
    """The page of what `evaluation_record` gives."""
    title = f"{record['transcoder']} in place of the MLPs of {record['model']}"
    style = (files("tracer") / "evaluation.css").read_text(encoding="utf-8")
    sections = (_summary, _replaced, _reconstructed, _buckets, _densities, _decoders, _prompts)
    body = "\n".join(section(record) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{style}</style></head><body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _summary(record: dict[str, Any]) -> str:
    kind = "cross-layer" if record["cross_layer"] else "per-layer"
    lead = (
        f"A {kind} transcoder, {record['n_layers']} layers of {record['n_features']:,} features, evaluated on "
        f"{record['data']}: {record['tokens']:,} tokens in {record['sequences']:,} sequences, {record['answers']:,} "
        f"answers. Revisions: model {record['model_revision'] or 'unknown'}, transcoder "
        f"{record['transcoder_revision'] or 'unknown'}."
    )
    facts = {
        "Top-1 match": share(record["top1_match"]), "KL, nats": number(record["kl"]),
        "NMSE": number(record["nmse"]), "Relative error": number(record["relative_error"]),
        "L0, all layers": f"{record['l0']:.1f}", "Never fire here": share(record["dead"]),
    }  # fmt: skip
    if record["graphs"]["prompts"]:
        facts |= {"Replacement": f"{record['graphs']['replacement']:.3f}"}
        facts |= {"Completeness": f"{record['graphs']['completeness']:.3f}"}
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<p>{escape(lead)}</p><dl class="tiles">{tiles}</dl>'


def _replaced(record: dict[str, Any]) -> str:
    """Answers with MLPs replaced."""
    charts = [
        lines(title, {"alone": [one["alone"][key] for one in record["layers"]],
                      "with all before it": [one["up_to"][key] for one in record["layers"]]},
              across="replaced layer", show=show, top=top)
        for title, key, show, top in (
            ("Top-1 match", "top1_match", _percent, 1.0), ("KL from the model, nats", "kl", _short, None),
        )
    ]  # fmt: skip
    return _section(
        "Replacing layers",
        "How often the model's first choice stays the same, and how far its probabilities move, when the transcoder "
        "stands in for the MLP of one layer, or of that layer and all before it. No error terms are added.",
        _charts(charts),
    )


def _reconstructed(record: dict[str, Any]) -> str:
    """Errors and features of each layer."""
    layers = record["layers"]
    names, labels = [f"layer {one['layer']}" for one in layers], numbered(len(layers))
    errors: dict[str, Sequence[float | None]] = {
        "NMSE": [one["nmse"] for one in layers],
        "relative error": [one["relative_error"] for one in layers],
    }
    charts = [
        lines("Errors of MLP outputs", errors, across="layer", show=_short),
        bars(
            "Active features per token (L0)", [one["l0"] for one in layers], names, labels, across="layer", show=_short
        ),
        bars("Features that never fire", [one["dead"] for one in layers], names, labels, across="layer", show=_percent),
    ]
    columns = [
        "layer",
        "NMSE",
        "relative error",
        "L0",
        "never fire",
        "top-1 alone",
        "KL alone",
        "top-1 up to",
        "KL up to",
    ]
    rows = [
        [
            str(one["layer"]), number(one["nmse"]), number(one["relative_error"]), f"{one['l0']:.1f}",
            share(one["dead"]), share(one["alone"]["top1_match"]), number(one["alone"]["kl"]),
            share(one["up_to"]["top1_match"]), number(one["up_to"]["kl"]),
        ]
        for one in layers
    ]  # fmt: skip
    return _section(
        "Layer by layer",
        "NMSE is Σ squared error / Σ squared norm: large outputs rule it. The relative error is the mean of each "
        "token's own squared error / squared norm: every token counts alike.",
        _charts(charts) + table(columns, rows),
    )


def _buckets(record: dict[str, Any]) -> str:
    """Errors by norm and by position."""
    norms = [one for one in record["by_norm"] if one["tokens"]]
    places = [one for one in record["by_position"] if one["tokens"]]
    groups = [(f"norm {one['name']}", one) for one in norms] + [(f"position {one['name']}", one) for one in places]
    if record["at_answer"] is not None:
        groups.append(("last", record["at_answer"]))
    tables = []
    for title, key in (("Relative error", "relative_error"), ("NMSE", "nmse"), ("L0", "l0")):
        rows = [
            (str(layer["layer"]), [layer[key], *(one["layers"][i][key] for _, one in groups)])
            for i, layer in enumerate(record["layers"])
        ]
        if key != "l0":
            rows.append(("all", [record[key], *(one[key] for _, one in groups)]))
        show = number if key != "l0" else "{:.1f}".format
        tables.append(f"<h3>{title}</h3>{heat_table('layer', ['all', *(name for name, _ in groups)], rows, show)}")
    answers = [[name, share(one.get("top1_match")), number(one.get("kl"))] for name, one in groups if "kl" in one]
    known = [row for row in answers if row[1]]
    tables.append("<h3>Answers with all MLPs replaced</h3>" + table(["read at", "top-1 match", "KL"], known))
    return _section(
        "By size and by position",
        "Norms are those of the MLP output, in root mean squares of its layer (for answers, of all layers); positions "
        "count from the start of the sequence, whose first token is left out. Means over all tokens can hide a "
        "transcoder that fails where answers are made.",
        "".join(tables),
    )


def _densities(record: dict[str, Any]) -> str:
    """How often features fire, layer by layer."""
    counts = [[float(n) for n in one["density_histogram"]] for one in record["layers"]]
    bounds = [0.0, *record["density_bounds"], 1.0]
    used = [i for i in range(1, len(bounds)) if any(layer[i] for layer in counts)]
    first, last = min(used, default=1), max(used, default=1)
    names = ["never", *(f"{_rate(bounds[i - 1])} to {_rate(bounds[i])} of tokens" for i in range(first, last + 1))]
    labels = [(0.5, "never")] + [
        (i - first + 2.0, _rate(bounds[i])) for i in range(first, last + 1) if (len(bounds) - 1 - i) % 2 == 0
    ]
    charts = [
        bars(f"Layer {number}", [layer[0], *layer[first : last + 1]], names, labels, across="of tokens",
             show=_short, apart=0)
        for number, layer in enumerate(counts)
    ]  # fmt: skip
    return _section(
        "How often features fire",
        f"Features by the share of tokens they fire on. With {record['tokens']:,} tokens, rarer than one in so many "
        "looks like never.",
        f'<div class="charts small">{"".join(charts)}</div>',
    )


def _decoders(record: dict[str, Any]) -> str:
    """Where features write."""
    columns = [str(one["layer"]) for one in record["layers"]]
    rows = [(str(one["layer"]), one["decoder_norms"]) for one in record["layers"]]
    return _section(
        "Where features write",
        "Mean norm of the decoder vectors from the features of a layer (row) to the MLP output of each layer (column).",
        heat_table("from", columns, rows, "{:.3f}".format),
    )


def _prompts(record: dict[str, Any]) -> str:
    """The traced prompts."""
    prompts = record["graphs"]["prompts"]
    if not prompts:
        return ""
    columns = ["prompt", "answer", "all replaced", "probability", "KL", "replacement", "completeness", "features"]
    rows = []
    for one in prompts:
        answer, other = one["answer"].strip(), one["replaced_answer"].strip()
        scores = [f"{one['replacement']:.3f}", f"{one['completeness']:.3f}", str(one["active_features"])]
        marked = other if one["answer"] == one["replaced_answer"] else f"{other} ≠"
        rows.append([one["prompt"], answer, marked, share(one["probability"]), number(one["kl"]), *scores])
    return _section(
        "Traced prompts",
        "Replacement is the share of the influence on the answer that flows from words rather than from errors, "
        "completeness the share of all inputs in the graph that are no errors; both of the whole graph.",
        f'<div class="prompts">{table(columns, rows, n_texts=3)}</div>',
    )


def _section(title: str, lead: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(lead)}</p>{body}</section>"


def _charts(charts: list[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _rate(density: float) -> str:
    return f"{100 * density:.0f}%" if density > 0.09 else f"{100 * density:.1g}%"
