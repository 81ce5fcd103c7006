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
        pa.field("relative_error_by_norm", pa.list_(pa.float64())),
        pa.field("relative_error_by_position", pa.list_(pa.float64())),
    ]
)


@dataclass
class Gathered:
    """Sums over the steps since they were last read; all on the device."""

    n_layers: int
    device: torch.device
    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, outcome: Outcome, position: Int[Tensor, " token"]) -> None:
        """Count one step."""
        self.steps += 1
        relative = outcome.error / outcome.size.clamp(min=1e-12)
        size = (outcome.size / outcome.size.mean(1, keepdim=True)).sqrt()
        for name, value in (
            ("loss", outcome.loss.detach()), ("error", outcome.error.mean(1)), ("size", outcome.size.mean(1)),
            ("relative", relative.mean()), ("l0", outcome.firing.sum(1)), ("threshold", outcome.threshold),
            ("by norm", _by_bucket(relative, bucket(size, NORMS), len(NORMS) + 1)),
            ("by position", _by_bucket(relative, bucket(position, POSITIONS).expand_as(relative), len(POSITIONS) + 1)),
        ):  # fmt: skip
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def read(self, place: Place, dead: Float[Tensor, " layer"]) -> dict[str, Any]:
        """The means of all processes, as a row but for what the loop knows; starts over. Waits for the device."""
        sums = {name: value.float() for name, value in self.sums.items()}
        sums["l0"], dead = added_up(place, sums["l0"]), added_up(place, dead) / place.shards
        average(place, [*sums.values()])
        nmse = sums["error"] / sums["size"]
        l0 = sums["l0"] / self.steps
        row = {
            "threshold": float(sums["threshold"] / self.steps), "loss": float(sums["loss"] / self.steps),
            "nmse": float(nmse.mean()), "relative_error": float(sums["relative"] / self.steps),
            "l0": float(l0.sum()), "dead": float(dead.mean()), "nmse_by_layer": nmse.tolist(),
            "l0_by_layer": l0.tolist(), "dead_by_layer": dead.tolist(),
            "relative_error_by_norm": _means(sums["by norm"]),
            "relative_error_by_position": _means(sums["by position"]),
        }  # fmt: skip
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


def _by_bucket(values: Tensor, bucket: Tensor, n: int) -> Float[Tensor, "2 bucket"]:
    """Sums and counts."""
    bucket = bucket.flatten()
    sums = values.new_zeros(n).index_add_(0, bucket, values.flatten())
    return torch.stack([sums, torch.zeros_like(sums).index_add_(0, bucket, torch.ones_like(values.flatten()))])


def _means(sums_and_counts: Float[Tensor, "2 bucket"]) -> list[float | None]:
    """None where there was no token."""
    return [total / n if n else None for total, n in zip(*sums_and_counts.tolist(), strict=True)]
