"""Activations of one stream of text in random order: a buffer on the device that is filled as it is used up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.corpus import Packed

Activations = tuple[Float[Tensor, "layer token d_model"], Float[Tensor, "layer token d_model"], Int[Tensor, " token"]]
"""What every MLP reads and writes at some tokens, and the tokens' positions."""


@dataclass(frozen=True)
class Batch:
    """Activations to learn from, scaled."""

    inputs: Float[Tensor, "layer token d_model"]
    outputs: Float[Tensor, "layer token d_model"]
    position: Int[Tensor, " token"]


class ShuffleBuffer:
    """Holds `size` tokens in random order; half of them are served before their places are filled again.

    Its state is which tokens it holds, not their activations: those are computed again when a run is resumed.
    """

    def __init__(
        self, packed: Packed, activations: Callable[[Int[Tensor, "sequence position"]], Activations], size: int,
        sequences: int, seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.device = device
        self._packed = packed
        self._activations = activations
        self._sequences = sequences
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._forwards: dict[int, Int[Tensor, "sequence position"]] = {}
        """The sequences of each forward pass that somebody holds tokens of, by its number."""
        self._n_forwards = 0
        self._origin = torch.zeros(size, 2, dtype=torch.int64)
        """For each place the number of the forward pass and the token's number in it."""
        self._held: Batch | None = None
        self._rest: Activations | None = None
        self._rest_origin = (0, 0)
        self._served = 0
        self._serve_in(torch.arange(size))

    def next(self, n: int) -> Batch:
        """The next tokens."""
        if self._held is None:
            self._fill(torch.arange(self._size))
            self._shuffle()
        elif self._served + n > self._size // 2:
            self._fill(self._order[: self._served].sort().values)
            self._shuffle()
        held = self._held
        assert held is not None
        chosen = self._order_on_device[self._served : self._served + n]
        self._served += n
        return Batch(held.inputs[:, chosen], held.outputs[:, chosen], held.position[chosen])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that is needed to go on: plain values, and tensors."""
        plain = {
            "document": self._packed.document, "n_forwards": self._n_forwards, "rest": list(self._rest_origin),
            "served": self._served,
        }  # fmt: skip
        tensors = {f"forward.{number}": tokens for number, tokens in self._forwards.items()}
        tensors |= {
            "left": torch.tensor(self._packed.left, dtype=torch.int64), "origin": self._origin, "order": self._order,
            "generator": self._generator.get_state(),
        }  # fmt: skip
        return plain, tensors

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Hold what was held: the forward passes are repeated."""
        self._packed.restore(plain["document"], tensors["left"].tolist())
        self._n_forwards, self._served = plain["n_forwards"], plain["served"]
        self._origin = tensors["origin"]
        self._serve_in(tensors["order"])
        self._generator.set_state(tensors["generator"])
        rest, first = plain["rest"]
        numbers = sorted(int(name.removeprefix("forward.")) for name in tensors if name.startswith("forward."))
        self._forwards = {number: tensors[f"forward.{number}"] for number in numbers}
        for number, tokens in self._forwards.items():
            made = self._activations(tokens)
            [places] = (self._origin[:, 0] == number).nonzero(as_tuple=True)
            self._put(places, made, self._origin[places, 1])
            if number == rest:
                self._rest, self._rest_origin = made, (rest, first)

    def _shuffle(self) -> None:
        self._serve_in(torch.randperm(self._size, generator=self._generator))
        self._served = 0

    def _serve_in(self, order: Int[Tensor, " place"]) -> None:
        self._order = order
        self._order_on_device = order.to(self.device)  # all at once: no step waits for its own

    def _fill(self, places: Int[Tensor, " place"]) -> None:
        filled = 0
        while filled < len(places):
            if self._rest is None or self._rest_origin[1] == self._rest[0].shape[1]:
                tokens = self._packed.next(self._sequences)
                self._n_forwards += 1
                self._forwards[self._n_forwards] = tokens
                self._rest, self._rest_origin = self._activations(tokens), (self._n_forwards, 0)
            number, first = self._rest_origin
            n = min(len(places) - filled, self._rest[0].shape[1] - first)
            here = places[filled : filled + n]
            index = torch.arange(first, first + n)
            self._put(here, self._rest, index)
            self._origin[here] = torch.stack([torch.full((n,), number), index], dim=1)
            self._rest_origin = (number, first + n)
            filled += n
        held = {int(number) for number in self._origin[:, 0].unique()} | {self._rest_origin[0]}
        self._forwards = {number: tokens for number, tokens in self._forwards.items() if number in held}

    def _put(self, places: Int[Tensor, " place"], made: Activations, index: Int[Tensor, " place"]) -> None:
        inputs, outputs, position = made
        if self._held is None:
            n_layers, _, d_model = inputs.shape
            self._held = Batch(
                inputs.new_zeros(n_layers, self._size, d_model), outputs.new_zeros(n_layers, self._size, d_model),
                position.new_zeros(self._size),
            )  # fmt: skip
        places, index = places.to(inputs.device), index.to(inputs.device)
        self._held.inputs[:, places] = inputs[:, index]
        self._held.outputs[:, places] = outputs[:, index]
        self._held.position[places] = position[index]
