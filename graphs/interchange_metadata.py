"""Metadata and viewer state of circuit-tracer's graph JSON: what Neuronpedia's schema asks, and both ways between."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from graphs.annotations import Annotations, Supernode
from graphs.errors import GraphError
from graphs.graph import GraphInfo
from graphs.interchange_fields import (
    LIST,
    NAMED_TEXTS,
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    WHOLE,
    check_object,
    is_texts,
    is_whole,
    or_null,
    shown,
)
from graphs.interchange_nodes import MOST_LAYERS, OURS

WORD = re.compile(r"\w+|[^\w\s]+")
"""What traces take for a word, too."""
SLUG = re.compile(r"[A-Za-z0-9_.\-]{1,200}")

_REQUIRED = {"slug": TEXT, "scan": TEXT, "prompt_tokens": TEXTS, "prompt": TEXT}
_OPTIONAL = {
    "node_threshold": or_null(NUMBER),
    "schema_version": or_null(WHOLE),
    "transcoder_list": TEXTS,
    "feature_details": OBJECT,
    "info": OBJECT,
    "generation_settings": OBJECT,
    "pruning_settings": OBJECT,
    OURS: OBJECT,
}
_INSIDE = {
    "feature_details": {
        "feature_json_base_url": TEXT,
        "neuronpedia_source_set": TEXT,
        "neuronpedia_lorsa_source_set": TEXT,
    },
    "info": {
        "description": TEXT,
        "creator_name": TEXT,
        "creator_url": TEXT,
        "source_urls": LIST,
        "generator": OBJECT,
        "create_time_ms": NUMBER,
    },
    "generation_settings": {
        "max_n_logits": WHOLE,
        "desired_logit_prob": NUMBER,
        "batch_size": WHOLE,
        "max_feature_nodes": WHOLE,
    },
    "pruning_settings": {"node_threshold": NUMBER, "edge_threshold": NUMBER},
}
_PLAIN = (TEXT, NUMBER, WHOLE)
_GENERATION = {
    "max_n_logits": "max_logits",
    "desired_logit_prob": "logit_mass",
    "batch_size": "batch_size",
    "max_feature_nodes": "max_features",
}
_GAP = 40
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
_OUR_TYPES = {
    "tokens": TEXTS,
    "words": TEXTS,
    "token_ids": LIST,
    "tags": NAMED_TEXTS,
    "created_at": TEXT,
    **dict.fromkeys(("n_layers", "n_active_features"), WHOLE),
    **dict.fromkeys(("prompt", "model", "model_revision", "transcoder", "transcoder_revision"), TEXT),
    **dict.fromkeys(("tool_version", "config"), TEXT),
}


def metadata_record(info: GraphInfo, slug: str, scan: str | None) -> dict[str, Any]:
    """The metadata of a graph, with all that is known of it under `clt_tracer`."""
    settings = settings_of(info)
    generation = {theirs: settings[ours] for theirs, ours in _GENERATION.items() if settings.get(ours) is not None}
    kept = _kept(imported_record(settings))
    record: dict[str, Any] = {
        "slug": re.sub(r"[^a-z0-9_-]", "-", slug.lower()),
        "scan": scan or re.sub(r"[^A-Za-z0-9_.-]", "-", info.model) or "model",
        "transcoder_list": [],
        "prompt_tokens": list(info.tokens),
        "prompt": info.prompt,
        "schema_version": 1,
        "info": kept.pop("info", {})
        | {
            "generator": {"name": "clt-tracer", "version": info.tool_version},
            "create_time_ms": int(info.created_at.timestamp() * 1000),
        },
        "generation_settings": generation,
    }
    if settings.get("prune") and "node_threshold" in settings:
        # left out otherwise: Neuronpedia refuses null
        record["node_threshold"] = settings["node_threshold"]
        record["pruning_settings"] = {name: settings[name] for name in ("node_threshold", "edge_threshold")}
    record |= kept
    ours = {one.name: getattr(info, one.name) for one in fields(GraphInfo)}
    lists = {name: list(ours[name]) for name in ("tokens", "token_ids", "words")}
    record[OURS] = ours | lists | {"created_at": info.created_at.isoformat(), "tags": dict(info.tags)}
    return record


def check_metadata(value: object) -> dict[str, Any]:
    """The metadata, if every field is what Neuronpedia's schema says."""
    record = check_object("metadata", value, _REQUIRED, _OPTIONAL)
    for name, inside in _INSIDE.items():
        check_object(f"metadata.{name}", record.get(name, {}), {}, inside)
    if not SLUG.fullmatch(record["slug"]):
        raise GraphError(
            f"metadata: slug is {shown(record['slug'])}; expected up to 200 of A-Z, a-z, 0-9, '_', '.' and '-'."
        )
    if not record["scan"] or not record["scan"].isprintable():
        raise GraphError(f"metadata: scan is {shown(record['scan'])}; expected the name of a model or transcoder.")
    return record


def metadata_deviations(record: Mapping[str, Any]) -> Iterator[str]:
    """What circuit-tracer writes and this program reads, but Neuronpedia refuses."""
    if not re.fullmatch(r"[A-Za-z0-9_.\-]+", record["scan"]):
        yield f"metadata: scan is {shown(record['scan'])}; an upload needs A-Z, a-z, 0-9, '_', '.' and '-' only."
    for name in ("node_threshold", "schema_version"):
        if name in record and record[name] is None:
            yield f"metadata: {name} is null; leave it out."


def info_of(record: Mapping[str, Any], token_ids: Sequence[int], n_layers: int, n_features: int) -> GraphInfo:
    """What is known of the graph: all, if this program wrote the file; or else what the metadata say."""
    if OURS in record:
        return _our_info(record[OURS], record["prompt_tokens"])
    described = record.get("info", {})
    maker = described.get("generator", {})
    name = " ".join(str(maker.get(part, ""))[:80] for part in ("name", "version")).strip()
    names = {name: record[name] for name in ("slug", "scan", "schema_version") if name in record}
    tokens = tuple(record["prompt_tokens"])
    return GraphInfo(
        prompt=record["prompt"],
        tokens=tokens,
        token_ids=tuple(token_ids),
        words=words_of(record["prompt"], tokens),
        model=record["scan"],
        model_revision="",
        transcoder=record.get("feature_details", {}).get("neuronpedia_source_set", record["scan"]),
        transcoder_revision="",
        created_at=_time(described.get("create_time_ms")),
        tool_version=name or "unknown",
        n_layers=n_layers,
        n_active_features=n_features,
        config=json.dumps({"imported": names | _kept(record)}, sort_keys=True),
    )


def settings_of(info: GraphInfo) -> dict[str, Any]:
    """The settings of a trace, if there are any."""
    try:
        settings = json.loads(info.config)
    except (ValueError, RecursionError) as error:
        raise GraphError(f"the graph's config is no JSON ({error}); it was not written by this program.") from error
    return settings if isinstance(settings, dict) else {}


def imported_record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of an imported graph say of its file; nothing for a traced one."""
    found = settings.get("imported")
    return found if isinstance(found, dict) else {}


def words_of(prompt: str, tokens: Sequence[str]) -> tuple[str, ...]:
    """Per token the word of the prompt around its first visible character; "" for special tokens and blanks."""
    spans = [(found.start(), found.end()) for found in WORD.finditer(prompt)]
    words, at, word = [], 0, 0
    for token in tokens:
        visible = token.strip()
        # the prompt may hold blanks that no token shows, and tokens may be broken letters that it does not hold
        start = prompt.find(visible, at, at + len(token) + _GAP)
        if start < 0 or not visible:
            words.append("")
            continue
        at = start + len(visible)
        while spans[word][1] <= start:
            word += 1
        words.append("" if _is_special(token) else prompt[slice(*spans[word])])
    return tuple(words)


def annotations_record(annotations: Annotations, ids: Sequence[str]) -> dict[str, Any]:
    """The `qParams` of a file."""
    return {"linkType": "both", "clickedId": "", "sg_pos": "", **annotations.view} | {
        "pinnedIds": [ids[node] for node in annotations.pinned],
        "supernodes": [[group.name, *(ids[node] for node in group.nodes)] for group in annotations.supernodes],
    }


def read_annotations(value: object, number: Mapping[str, int]) -> tuple[Annotations, dict[int, str], list[str]]:
    """Supernodes and pins, labels that were given by hand, and what Neuronpedia would refuse."""
    record = dict(check_object("qParams", value, {}, {"linkType": TEXT, "clickedId": TEXT, "sg_pos": TEXT}))
    notes: list[str] = []
    pinned, groups, labels = (record.pop(name, []) for name in ("pinnedIds", "supernodes", "clerps"))
    if isinstance(pinned, str):
        notes.append("qParams: pinnedIds is a text; expected a list of texts.")
        pinned = [text for text in pinned.split(",") if text]
    if isinstance(groups, str):
        notes.append("qParams: supernodes is a text; expected a list of lists.")
        groups = _unpacked("supernodes", groups)
    if isinstance(labels, str):
        labels = _unpacked("clerps", labels)
    if not is_texts(pinned):
        raise GraphError("qParams: pinnedIds is no list of texts; expected ids of nodes.")
    supernodes = []
    for place, group in enumerate(_lists("supernodes", groups)):
        supernodes.append(Supernode(group[0], tuple(_node(f"supernode {place}", text, number) for text in group[1:])))
    given = {number[key]: text for key, text in (pair[:2] for pair in _lists("clerps", labels)) if key in number}
    pins = tuple(_node("pinnedIds", text, number) for text in pinned)
    return Annotations(tuple(supernodes), pins, record), given, notes


def _lists(name: str, value: object) -> list[list[str]]:
    if not isinstance(value, list) or not all(is_texts(entry) and len(entry) >= 2 for entry in value):
        raise GraphError(f"qParams: {name} is {shown(value)}; expected a list of lists of texts, each a name and ids.")
    return value


def _unpacked(name: str, text: str) -> object:
    try:
        return json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise GraphError(f"qParams: {name} is {shown(text)}; expected a list of lists of texts.") from error


def _node(where: str, text: str, number: Mapping[str, int]) -> int:
    if text not in number:
        raise GraphError(f"qParams: {where} names {shown(text)}, which is the id of no node; add the node.")
    return number[text]


def _our_info(value: object, tokens: list[str]) -> GraphInfo:
    where = f"metadata.{OURS}"
    numbers = {
        one.name: or_null(NUMBER) if one.default is None else NUMBER
        for one in fields(GraphInfo)
        if one.name not in _OUR_TYPES
    }
    record = check_object(where, value, _OUR_TYPES | numbers, {})
    known: dict[str, Any] = {one.name: record[one.name] for one in fields(GraphInfo)}
    if not 0 <= record["n_layers"] <= MOST_LAYERS:
        raise GraphError(f"{where}: n_layers is {shown(record['n_layers'])}; expected 0 to {MOST_LAYERS}.")
    lists = {name: tuple(record[name]) for name in ("tokens", "token_ids", "words")}
    if list(lists["tokens"]) != tokens:
        raise GraphError(f"{where}: tokens are not those in prompt_tokens; export the graph again.")
    if not all(is_whole(number) and abs(number) < 1 << 31 for number in lists["token_ids"]):
        raise GraphError(f"{where}: token_ids holds what is no number of a token; export the graph again.")
    known |= {**lists, "created_at": _parsed(record["created_at"]), "tags": tuple(record["tags"].items())}
    return GraphInfo(**known)


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of another program says of itself and its export says again: plain fields that are as expected."""
    found: dict[str, Any] = {}
    if NUMBER.fits(record.get("node_threshold")):
        found["node_threshold"] = record["node_threshold"]
    for name, kinds in _INSIDE.items():
        part = record.get(name)
        if isinstance(part, dict):
            found[name] = {key: part[key] for key, kind in kinds.items() if kind in _PLAIN and kind.fits(part.get(key))}
    return found


def _parsed(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise GraphError(f"metadata.{OURS}: created_at is {shown(text)}; expected a time as ISO 8601.") from error


def _time(milliseconds: int | float | None) -> datetime:
    if milliseconds is None:
        return datetime.now(UTC)
    if not 0 <= milliseconds / 1000 < (_LAST - _FIRST).total_seconds():
        raise GraphError(f"metadata.info: create_time_ms is {shown(milliseconds)}; expected milliseconds since 1970.")
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _is_special(token: str) -> bool:
    return bool(re.fullmatch(r"<[^<>\s]*>|\[[A-Z]+\]", token.strip()))
