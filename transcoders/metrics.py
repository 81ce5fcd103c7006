"""What a training run reports: gathered on the device, read every so many steps, kept as a Parquet file."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.files import write_atomically
from transcoders.objective import Outcome
from transcoders.parallel import Place, added_up, average

NORMS = (0.5, 1.0, 2.0)
"""Where tokens are parted by the size of what there is to explain, in units of the layer's root mean square."""
POSITIONS = (4.0, 16.0, 64.0)
"""Where tokens are parted by position: attention sinks and what hangs on them come first."""
PARTS = ("norm", "position")
BY_TOKEN = ("nmse", "relative_error", "l0")
"""What is told of the tokens of every bucket."""

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("tokens", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("tokens_per_second", pa.float64()),
        pa.field("learning_rate", pa.float64()),
        pa.field("k", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("loss", pa.float64()),
        pa.field("nmse", pa.float64()),
        pa.field("relative_error", pa.float64()),
        pa.field("l0", pa.float64()),
        pa.field("dead", pa.float64()),
        pa.field("nmse_by_layer", pa.list_(pa.float64())),
        pa.field("l0_by_layer", pa.list_(pa.float64())),
        pa.field("dead_by_layer", pa.list_(pa.float64())),
        *[pa.field(f"{name}_by_{part}", pa.list_(pa.float64())) for part in PARTS for name in BY_TOKEN],
    ]
)


@dataclass
class Gathered:
    """Sums over the steps since they were last read; all on the device."""

    square: Float[Tensor, " layer"]
    """Mean squared norm of what there is to explain, measured before the first step: in units of its root tokens are
    parted by size, those of every process alike."""
    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, outcome: Outcome, position: Int[Tensor, " token"]) -> None:
        """Count one step."""
        self.steps += 1
        relative = outcome.error / outcome.size.clamp(min=1e-12)
        size = (outcome.size / self.square[:, None]).sqrt()
        values = {
            "loss": outcome.loss.detach(), "error": outcome.error.mean(1), "size": outcome.size.mean(1),
            "relative": relative.mean(), "l0": outcome.l0.mean(1), "threshold": outcome.threshold,
        }  # fmt: skip
        for part, number, n in (
            ("norm", bucket(size, NORMS), len(NORMS) + 1),
            ("position", bucket(position, POSITIONS).expand_as(relative), len(POSITIONS) + 1),
        ):
            for name, quantity in (
                ("error", outcome.error), ("size", outcome.size), ("relative", relative), ("l0", outcome.l0),
                ("tokens", torch.ones_like(relative)),
            ):  # fmt: skip
                values[f"{name} by {part}"] = _by_bucket(quantity, number, n)
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def read(self, place: Place, dead: Float[Tensor, " layer"]) -> dict[str, Any]:
        """The means of all processes, as a row but for what the loop knows; starts over. Waits for the device."""
        sums = {name: value.float() for name, value in self.sums.items()}
        sums |= {name: added_up(place, value) for name, value in sums.items() if is_of_own_features(name)}
        dead = added_up(place, dead) / place.shards
        average(place, [*sums.values()])
        nmse = sums["error"] / sums["size"]
        l0 = sums["l0"] / self.steps
        row = {
            "threshold": float(sums["threshold"] / self.steps), "loss": float(sums["loss"] / self.steps),
            "nmse": float(nmse.mean()), "relative_error": float(sums["relative"] / self.steps),
            "l0": float(l0.sum()), "dead": float(dead.mean()), "nmse_by_layer": nmse.tolist(),
            "l0_by_layer": l0.tolist(), "dead_by_layer": dead.tolist(),
        }  # fmt: skip
        for part in PARTS:
            row |= _bucket_row(sums, part)
        self.steps, self.sums = 0, {}
        return row


def save_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put all rows so far into the file."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    write_atomically(path, partial(pq.write_table, table, compression="zstd"))


def load_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows up to a step; none if there is no file."""
    if not path.is_file():
        return []
    return [row for row in pq.read_table(path).to_pylist() if row["step"] <= last_step]


def bucket(values: Tensor, bounds: tuple[float, ...]) -> Tensor:
    """Number of the bucket of each value: so many bounds are no larger than it."""
    # not bucketize: it takes a tensor of bounds, and to send one to a GPU the host would wait every step
    number = torch.zeros_like(values, dtype=torch.int64)
    for bound in bounds:
        number += values >= bound
    return number


def is_of_own_features(name: str) -> bool:
    """Whether a sum counts the features of one process, not of all."""
    return name.startswith("l0")


def _by_bucket(
    values: Float[Tensor, "layer token"], bucket: Int[Tensor, "layer token"], n: int
) -> Float[Tensor, "layer bucket"]:  # fmt: skip
    """Sums over the tokens of each bucket."""
    return values.new_zeros(len(values), n).scatter_add_(1, bucket, values.float())


def _bucket_row(sums: dict[str, Tensor], part: str) -> dict[str, list[float | None]]:
    """Means over the layers' tokens, of NMSE over layers, and of L0 per token of all layers; None where none was."""
    error, size, relative, l0, tokens = (
        sums[f"{name} by {part}"].double() for name in ("error", "size", "relative", "l0", "tokens")
    )
    n, some = tokens.sum(0), tokens > 0
    nmse = torch.where(some, error / size, 0.0).sum(0) / some.sum(0)
    means = {"nmse": nmse, "relative_error": relative.sum(0) / n, "l0": l0.sum(0) / n * len(l0)}
    return {f"{name}_by_{part}": _known(value, n) for name, value in means.items()}


def _known(values: Float[Tensor, " bucket"], tokens: Float[Tensor, " bucket"]) -> list[float | None]:
    return [value if n else None for value, n in zip(values.tolist(), tokens.tolist(), strict=True)]
