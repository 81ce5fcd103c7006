"""Many processes on one transcoder: a mesh of data × features on torch.distributed.

Every process of a feature group sees the same tokens and holds its own features: their encoders, decoders and optimiser
state. They exchange what their features write, summed, once per step. Data groups see different tokens and exchange
gradients.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from transcoders.errors import TranscoderError

LOST = ("onnection closed", "onnection reset", "roken pipe", "Timed out", "timed out", "NCCL", "peer")


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train together."""

    data_part: int = 0
    data_parts: int = 1
    shard: int = 0
    shards: int = 1
    data_group: ProcessGroup | None = None
    feature_group: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.data_part == 0 and self.shard == 0

    @property
    def size(self) -> int:
        return self.data_parts * self.shards

    def features(self, n_features: int) -> range:
        """The features of a layer that this process holds."""
        if n_features % self.shards:
            raise TranscoderError(
                f"{n_features} features a layer cannot be split over {self.shards} processes; expected a multiple."
            )
        each = n_features // self.shards
        return range(self.shard * each, (self.shard + 1) * each)

    def streams(self, streams: int) -> range:
        """The streams of data that this process reads."""
        if streams % self.data_parts:
            raise TranscoderError(
                f"{streams} streams cannot be split over {self.data_parts} groups of processes; expected a multiple."
            )
        return range(self.data_part, streams, self.data_parts)


@contextmanager
def joined(shards: int | None, device: str) -> Iterator[Place]:
    """This process's place among those that torchrun started; alone where it started none.

    `shards` processes hold the features of one transcoder between them; by default all of them do.
    """
    if "WORLD_SIZE" not in os.environ:
        if (shards or 1) != 1:
            raise TranscoderError(f"{shards} shards need as many processes; start them with torchrun --nproc-per-node.")
        yield Place()
        return
    world = int(os.environ["WORLD_SIZE"])
    shards = shards or world
    if world % shards:
        raise TranscoderError(f"{world} processes cannot be grouped by {shards} shards; expected a multiple.")
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(kind, (world // shards, shards), mesh_dim_names=("data", "feature"))
        yield Place(
            mesh.get_local_rank("data"), world // shards, mesh.get_local_rank("feature"), shards,
            mesh.get_group("data"), mesh.get_group("feature"),
        )  # fmt: skip
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        raise TranscoderError(
            "another process of this training run was lost; start the same command again to go on from the last "
            "checkpoint."
        ) from error
    finally:
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """Sum over processes; every process goes on with the same sum, so each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def summed(place: Place, part: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """What all features write together."""
    return part if place.shards == 1 else _Sum.apply(part, place.feature_group)


@torch.no_grad()
def added_up(place: Place, part: Tensor) -> Tensor:
    """The sum over all shards, without a gradient."""
    if place.shards > 1:
        part = part.clone()
        dist.all_reduce(part, group=place.feature_group)
    return part


@torch.no_grad()
def gathered(place: Place, part: Float[Tensor, "*shape last"]) -> Float[Tensor, "*shape all"]:
    """The parts of all shards, side by side along the last axis."""
    if place.shards == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(place.shards)]
    dist.all_gather(parts, part.contiguous(), group=place.feature_group)
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def gathered_everywhere(place: Place, part: Float[Tensor, " part"]) -> Float[Tensor, " all"]:
    """The parts of all processes, one after the other."""
    if place.size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(place.size)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def average(place: Place, values: list[Tensor]) -> None:
    """Means over the data groups, in place."""
    if place.data_parts == 1:
        return
    for value in values:
        dist.all_reduce(value, group=place.data_group)
        value /= place.data_parts


def anywhere(place: Place, flag: bool) -> bool:
    """Whether the flag is up in any process."""
    if place.size == 1:
        return flag
    value = torch.tensor(int(flag))
    if dist.get_backend() == "nccl":
        value = value.cuda()
    dist.all_reduce(value)
    return bool(value)


def wait_for_all(place: Place) -> None:
    """Return when every process has come this far."""
    if place.size > 1:
        dist.barrier()
