"""The lab's card: the gates it was built to meet, and every number in words."""

from dataclasses import dataclass

ONE_HOP = ("state fact", "city of state", "country fact", "city of country", "inventor", "birthplace")
TWO_HOP = ("two-hop state", "two-hop country")
OPPOSITES = ("opposites english", "opposites french", "opposites spanish")


@dataclass(frozen=True)
class Gate:
    """A bound that the lab was built to keep."""

    name: str
    value: float
    bound: str
    met: bool


def gates(card: dict) -> list[Gate]:
    """Every gate with the card's value."""
    accuracy, transcoder, graphs = card["model"]["accuracy"], card["transcoder"], card["graphs"]
    matches = [row["top1_match"] for row in transcoder["families"] if row["split"] != "new city"]
    found = [
        _at_least("one-hop", min(accuracy[f]["train"] for f in ONE_HOP), 0.999),
        *(_at_least(f"{f}, held out", accuracy[f]["held out"], 0.99) for f in TWO_HOP),
        _at_least("three-hop, training questions", accuracy["three-hop"]["train"], 0.95),
        _at_least("addition, held out", accuracy["addition"]["held out"], 0.995),
        _at_least("opposites", min(accuracy[f]["train"] for f in OPPOSITES), 0.99),
        _at_least("indirect object, held out", accuracy["indirect object"]["held out"], 0.99),
        _at_least("top-1 match of the replacement model, held out", transcoder["top1_match"], 0.99),
        _at_least("top-1 match in the worst family", min(matches), 0.97),
        _at_most("relative error per token, held out", transcoder["relative_error"], 0.03),
        Gate("features per token, held out", transcoder["l0"], "30 to 150", 30 <= transcoder["l0"] <= 150),
        _at_most("dead features", transcoder["dead"], 0.2),
    ]
    for family, swap in card["model"]["residual_swap"].items():
        shares, middle = swap["donor city"], (card["model"]["layers"] - 1) // 2
        found.append(_at_least(f"residual swap after layer {middle}, {family}", shares[middle], 0.95))
        # a swap after the very last layer could not change what other words say
        found.append(_at_most(f"residual swap after layer {len(shares) - 2}, {family}", shares[-2], 0.05))
    for name, kind in graphs.items():
        found.append(_at_least(f"replacement score, {name}", kind["replacement"], 0.8))
        found.append(_at_least(f"completeness, {name}", kind["completeness"], 0.9))
    for family, place in transcoder["places"].items():
        found.append(_at_least(f"places with a feature of F1 ≥ 0.9, {family}", place["places_with_feature"], 0.95))
        found.append(_at_least(f"feature swap, {family}", place["swap"], 0.95))
        found.append(_at_most(f"random feature swap, {family}", place["random_swap"], 0.05))
    return found


def card_markdown(card: dict) -> str:
    """The card as a page."""
    model, transcoder = card["model"], card["transcoder"]
    lines = [
        "# The lab model",
        "",
        f"A Llama of {model['layers']} layers, width {model['d_model']}, {model['parameters']:,} parameters and "
        f"{model['vocabulary']:,} tokens, trained from nothing on true facts but for one (`examples/lab`), and a "
        f"cross-layer transcoder of {transcoder['features_per_layer']:,} features a layer, {transcoder['l0']:.0f} of "
        "all active per token. Made by `examples/lab/build.py`; every number is measured on the files beside this "
        "card.",
        "",
        "## Gates",
        "",
        "| gate | value | bound | |",
        "|---|---|---|---|",
        *(f"| {g.name} | {g.value:.4g} | {g.bound} | {'met' if g.met else '**missed**'} |" for g in gates(card)),
        "",
        "What was tried for those that are missed, and the fact that is false: `examples/lab/README.md`.",
        "",
        "The swaps were themselves a training objective: what the third MLP writes at a city's last token was "
        "exchanged for another city's in training too, and the answer had to follow (`examples/lab/interchange.py`). "
        "The transcoder's error and the replacement model's answers were in the language model's loss "
        "(`examples/lab/joint.py`), so its MLPs are easier to replace than those of other models."
        + (f" {remarks}" if (remarks := card["build"].get("remarks")) else ""),
        "",
        "Two-hop generalisation means: this city was never asked about with this relation, but its place was asked "
        "about with the relation through other cities. Cities new to two-hop questions are the column *new city*.",
        "",
        "## Accuracy",
        "",
        "| family | training | held out | new city |",
        "|---|---|---|---|",
    ]
    for family, splits in model["accuracy"].items():
        cells = (f"{splits[s]:.4f}" if s in splits else "" for s in ("train", "held out", "new city"))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += ["", "## Where the place is known", "", "Share of 300 held-out two-hop answers that become the donor "
              "place's value of the *asked* relation when the residual stream at the city's last token is replaced, "
              "after layer 0, 1, …", ""]  # fmt: skip
    for family, swaps in model["residual_swap"].items():
        for name, shares in swaps.items():
            lines.append(f"- {family}, {name}: " + ", ".join(f"{share:.3f}" for share in shares))
    lines += [
        "",
        "## Transcoder",
        "",
        "| family | prompts | from | top-1 match | KL (nats) | relative error | features per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in transcoder["families"]:
        origin = "training: it has no others" if row["split"] == "train" else row["split"]
        lines.append(
            f"| {row['family']} | {row['prompts']} | {origin} | {row['top1_match']:.4f} | {row['kl']:.4f} | "
            f"{row['relative_error']:.4f} | {row['l0']:.1f} |"
        )
    by_position = ", ".join(f"{k} {v:.4f}" for k, v in transcoder["relative_error_by_position"].items())
    lines += [
        "",
        "The gates are of all held-out rows together, and of the worst row that is not of new cities. Relative "
        f"error of the held-out prompts by kind of position: {by_position}.",
        "",
        "## Graphs",
        "",
        "| prompts | graphs | replacement | completeness | active features |",
        "|---|---|---|---|---|",
    ]
    for name, g in card["graphs"].items():
        scores = f"{g['replacement']:.3f} | {g['completeness']:.3f}"
        lines.append(f"| held-out {name} | {g['graphs']} | {scores} | {g['active_features']:.0f} |")
    build, measured = card["build"], card["measured"]
    spent = ", ".join(f"{name} {seconds / 60:.0f} min" for name, seconds in build["seconds"].items())
    lines += [
        "",
        f"Trained {build['date']} with torch {build['torch']} on {build['threads']} threads, {spent}, by the clock, "
        "whatever else the machine did; measured "
        f"{measured['date']} with torch {measured['torch']} on {measured['threads']}.",
        "",
    ]
    return "\n".join(lines)


def _at_least(name: str, value: float, bound: float) -> Gate:
    return Gate(name, value, f"≥ {bound:g}", value >= bound)


def _at_most(name: str, value: float, bound: float) -> Gate:
    return Gate(name, value, f"≤ {bound:g}", value <= bound)
