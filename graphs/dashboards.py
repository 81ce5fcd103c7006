"""Feature dashboards as circuit-tracer serves them: an index of offsets, and per layer a file of packed records."""

import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors
from graphs.interchange_fields import (
    LIST,
    NUMBER,
    TEXT,
    TEXTS,
    WHOLE,
    check_object,
    is_number,
    is_whole,
    or_null,
    shown,
)
from graphs.interchange_nodes import pair
from graphs.interchange_text import ignore
from graphs.schema import tables

LARGEST = 1 << 24
"""Bytes of one unpacked record; hostile data can be packed a thousandfold."""
LARGEST_INDEX = 1 << 28

_RECORD = {"index": WHOLE, "examples_quantiles": LIST}
_OPTIONAL = {
    "top_logits": TEXTS,
    "bottom_logits": TEXTS,
    "act_max": or_null(NUMBER),
    "activation_frequency": or_null(NUMBER),
    "histogram": LIST,
    "label": or_null(TEXT),
    "clerp": or_null(TEXT),
}
_EXAMPLE = {"tokens": TEXTS, "tokens_acts_list": LIST}
_BATCH = 2_000


def read_dashboards(folder: Path, transcoder: str, *, on_progress: Callable[[int, int], None] = ignore) -> pa.Table:
    """Table `features` of a folder with `index.json.gz` and `layer_*.bin`.

    `on_progress` is told how many features were read, and how many there are.
    """
    with file_errors_as_graph_errors(f"read {folder}"):
        index = _index(folder)
        total = sum(len(offsets) - 1 for _, offsets in index)
        batches, rows, done = [], [], 0
        for layer, (path, offsets) in enumerate(index):
            for row in _rows(path, offsets, transcoder, layer):
                rows.append(row)
                done += 1
                if len(rows) == _BATCH:
                    batches.append(pa.Table.from_pylist(rows, schema=tables()["features"]))
                    rows = []
                    on_progress(done, total)
    return pa.concat_tables([*batches, pa.Table.from_pylist(rows, schema=tables()["features"])])


def _index(folder: Path) -> list[tuple[Path, list[int]]]:
    """Per layer its file and where its records begin and end."""
    path = folder / "index.json.gz"
    try:
        with gzip.open(path) as file:
            text = file.read(LARGEST_INDEX + 1)
        if len(text) > LARGEST_INDEX:
            raise ValueError(f"it unpacks to more than {LARGEST_INDEX:,} bytes")
        entries = json.loads(text)
    except FileNotFoundError:
        raise GraphError(f"{folder} has no index.json.gz; give the folder features/ of a transcoder.") from None
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise GraphError(f"{path} cannot be read ({_reason(error)}); fetch it again.") from error
    if not isinstance(entries, list):
        raise GraphError(f"{path} is no list of layers; fetch it again.")
    found = []
    for layer, entry in enumerate(entries):
        where = f"{path}: layer {layer}"
        record = check_object(where, entry, {"filename": TEXT, "offsets": LIST}, {})
        name, offsets = record["filename"], record["offsets"]
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise GraphError(f"{where}: filename {name[:40]!a} is not that of a file beside the index.")
        if not all(map(is_whole, offsets)) or offsets != sorted(offsets) or (offsets and offsets[0] < 0):
            raise GraphError(f"{where}: offsets are no ascending whole numbers; fetch the index again.")
        found.append((folder / name, [int(offset) for offset in offsets]))
    return found


def _rows(path: Path, offsets: list[int], transcoder: str, layer: int) -> Iterator[dict[str, Any]]:
    """The features of one layer; where two offsets are equal there is none."""
    if offsets and offsets[-1] > path.stat().st_size:
        raise GraphError(f"{path} ends before its last feature does; fetch the file again.")
    with path.open("rb") as file:
        for number, (start, end) in enumerate(pairwise(offsets)):
            if end == start:
                continue
            where = f"{path.name}: feature {number}"
            yield _row(where, _unpacked(where, file, start), transcoder, layer, number)


def _unpacked(where: str, file: BinaryIO, start: int) -> object:
    file.seek(start)
    try:
        (length,) = struct.unpack("<I", file.read(4))
        if length > LARGEST:
            raise ValueError(f"{length} bytes are more than a record has")
        unpack = zlib.decompressobj()
        text = unpack.decompress(file.read(length), LARGEST)
        if not unpack.eof:
            raise ValueError("it is cut off, or unpacks to too much")
        return json.loads(text)
    except (struct.error, zlib.error, ValueError, RecursionError) as error:
        raise GraphError(f"{where} cannot be read ({_reason(error)}); fetch the file again.") from error


def _row(where: str, record: object, transcoder: str, layer: int, feature: int) -> dict[str, Any]:
    found = check_object(where, record, _RECORD, _OPTIONAL)
    if found["index"] not in (feature, pair(layer, feature)):
        raise GraphError(f"{where}: index is {shown(found['index'])}; expected {feature}; the index is of other files.")
    examples = [
        _example(where, example)
        for quantile in found["examples_quantiles"]
        for example in check_object(where, quantile, {"examples": LIST}, {})["examples"]
    ]
    # the same example may stand in several quantiles
    unique = {(tuple(one["tokens"]), tuple(one["activations"])): one for one in examples}
    label = found.get("label") or found.get("clerp")
    return {
        "transcoder": transcoder,
        "layer": layer,
        "feature": feature,
        "density": found.get("activation_frequency"),
        "max_activation": found.get("act_max"),
        "top_logits": [{"token": token, "value": None} for token in found.get("top_logits", [])],
        "bottom_logits": [{"token": token, "value": None} for token in found.get("bottom_logits", [])],
        "examples": list(unique.values()),
        "histogram": [_count(where, count) for count in found.get("histogram", [])],
        "label": label,
        "label_source": None if label is None else "dashboard",
        "label_precision": None,
        "label_recall": None,
    }


def _count(where: str, value: object) -> int:
    if not is_number(value) or not 0 <= float(value) < 2**63:  # type: ignore[arg-type]
        raise GraphError(f"{where}: histogram holds {shown(value)}; expected counts of tokens; fetch the file again.")
    return int(value)  # type: ignore[call-overload]


def _example(where: str, value: object) -> dict[str, Any]:
    found = check_object(f"{where}: an example", value, _EXAMPLE, {"train_token_ind": WHOLE})
    activations = found["tokens_acts_list"]
    if not all(map(is_number, activations)) or len(activations) != len(found["tokens"]):
        raise GraphError(f"{where}: an example has not one finite activation per token; fetch the file again.")
    strongest = max(range(len(activations)), key=activations.__getitem__, default=0)
    position = int(found.get("train_token_ind", strongest))
    if not 0 <= position < max(1, len(activations)):
        raise GraphError(
            f"{where}: train_token_ind of an example is {shown(position)}, and it has {len(activations)} tokens; "
            "fetch the file again."
        )
    return {"tokens": found["tokens"], "activations": [float(value) for value in activations], "position": position}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
