"""What feeds each MLP output, position by position, ready for matrix products: prepared once per prompt.

Sources are numbered as the nodes of the graph are: tokens, then layer by layer the active features and the errors (none
at position 0). Columns hold the same sources by position first: at any layer, those of one position that can write
there are one contiguous block.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.local import LocalReplacementModel, logits_error
from transcoders.memory import free_memory

WRITES = 1 / 8
"""Write vectors are held if they take no more than this share of the free memory; else they are made as needed."""
CHUNK, CHUNK_ON_GPU = 1 << 22, 1 << 28
"""Bytes of them made at once: few enough to stay in a processor's cache until they are multiplied, and on a GPU enough
for its kernels to take longer than their start."""


class Sources:
    """The sources of one prompt: where each stands, and what it writes into every MLP output."""

    @torch.no_grad()
    def __init__(self, local: LocalReplacementModel) -> None:
        self.local = local
        features, n_layers, n_positions = local.features, local.n_layers, local.n_positions
        device = local.error.device
        self.n_active = len(features.layer)
        per_layer = torch.bincount(features.layer, minlength=n_layers).tolist()
        self.first: list[int] = [n_positions]
        """[layer]: the number of its first source; of layer n_layers, how many sources there are."""
        for n in per_layer:
            self.first.append(self.first[-1] + n + n_positions - 1)
        layers, positions = [torch.full((n_positions,), -1)], [torch.arange(n_positions)]
        for layer, n in enumerate(per_layer):
            layers.append(torch.full((n + n_positions - 1,), layer))
            positions += [features.position[features.layer == layer].cpu(), torch.arange(1, n_positions)]
        self.layer, self.position = torch.cat(layers).to(device), torch.cat(positions).to(device)
        """Per source; a token's layer is −1."""
        self.number = torch.arange(self.n_active, device=device) + n_positions + features.layer * (n_positions - 1)
        """Of each active feature among the sources."""
        size = torch.ones(len(self.layer), dtype=local.error.dtype, device=device)
        size[self.number] = features.activation
        self._first_active = [0, *torch.tensor(per_layer).cumsum(0).tolist()]

        order = (self.position * (n_layers + 1) + self.layer + 1).argsort(stable=True)
        self.column = torch.empty_like(order)
        """Of each source."""
        self.size = size[order]
        """Per column by how much the source's vector is multiplied: a feature's activation, else 1."""
        self.column[order] = torch.arange(len(order), device=device)
        place = self.position[order] * (n_layers + 1) + self.layer[order] + 1
        self._start = torch.searchsorted(place, torch.arange(n_positions * (n_layers + 1) + 1, device=device)).tolist()
        needed = sum(sum(self._sizes(layer)) for layer in range(n_layers)) * local.error[0, 0].nbytes
        fits = needed <= WRITES * free_memory(device)
        self._held = [self._written(layer) for layer in range(n_layers)] if fits else None
        """Per layer what `writes` gives, in the order of columns, position after position."""
        self.constant = [self._constant(layer) for layer in range(n_layers)]
        """Per layer what is added to the residual stream and is no node."""
        self.logits_error = logits_error(local)
        """Law 1 is about the prompt, whatever is explained: checked once."""

    @property
    def n_sources(self) -> int:
        return self.first[-1]

    def n_columns(self, n: int) -> int:
        """Columns of the first n positions: they come first."""
        return self._start[n * (self.local.n_layers + 1)]

    def below(self, layer: int, n: int) -> Int[Tensor, " source"]:
        """The sources below a layer at the first n positions: all that can have an effect on a target there."""
        return (self.position[: self.first[layer]] < n).nonzero()[:, 0]

    def writes(self, layer: int, n: int) -> Iterator[tuple[int, slice, Float[Tensor, "source d_model"]]]:
        """What the sources of the first n positions write to a layer's MLP output: position, columns and vectors.

        Each vector is still to be multiplied by its source's `size`.
        """
        if self._held is None:
            yield from self._made(layer, n)
            return
        lowest, offset = self.local.transcoder.config.sources(layer).start, 0
        for position in range(n):
            columns = self._columns(position, lowest, layer)
            after = offset + columns.stop - columns.start
            yield position, columns, self._held[layer][offset:after]
            offset = after

    def _made(self, to: int, n: int) -> Iterator[tuple[int, slice, Float[Tensor, "source d_model"]]]:
        """The same made on the way, source layer by source layer."""
        local, features, writing = self.local, self.local.features, self.local.writing[to]
        at_once = (CHUNK if local.error.is_cpu else CHUNK_ON_GPU) // local.error[0, 0].nbytes
        for source in local.transcoder.config.sources(to):
            begin = self._first_active[source]
            positions = features.position[begin : self._first_active[source + 1]]
            here = torch.arange(n + 1, device=positions.device)
            starts = [begin + low for low in torch.searchsorted(positions, here).tolist()]
            first = 0
            while first < n:
                end = first + 1
                while end < n and starts[end + 1] - starts[first] <= at_once:
                    end += 1
                chosen = slice(starts[first], starts[end])
                rows = local.decoders[source].select(1, to - source).index_select(0, features.row[chosen])
                rows = writing.apply_at(rows.to(local.error.dtype), features.position[chosen])
                for position in range(first, end):
                    low, high = starts[position] - starts[first], starts[position + 1] - starts[first]
                    column = self._columns(position, source, source).start
                    yield position, slice(column, column + high - low), rows[low:high]
                first = end
        errors = writing.apply(local.error[to])
        for position in range(1, n):
            last = self._columns(position, to, to).stop
            yield position, slice(last - 1, last), errors[position : position + 1]

    def _sizes(self, layer: int) -> list[int]:
        """Per position how many columns can write to a layer's MLP output."""
        lowest = self.local.transcoder.config.sources(layer).start
        spans = [self._columns(position, lowest, layer) for position in range(self.local.n_positions)]
        return [span.stop - span.start for span in spans]

    def tokens(self, n: int) -> Int[Tensor, " position"]:
        """Columns of the first n tokens."""
        return self.column[:n]

    def _columns(self, position: int, lowest: int, highest: int) -> slice:
        """Columns of one position's sources from one layer to another."""
        first = position * (self.local.n_layers + 1) + 1
        return slice(self._start[first + lowest], self._start[first + highest + 1])

    def _written(self, to: int) -> Float[Tensor, "column d_model"]:
        """What `writes` gives of all sources for a layer, those of one position together."""
        sizes, lowest = torch.tensor(self._sizes(to)), self.local.transcoder.config.sources(to).start
        starts = torch.tensor([self._columns(position, lowest, to).start for position in range(len(sizes))])
        shift = (starts - sizes.cumsum(0) + sizes).tolist()
        written = self.local.error.new_zeros(int(sizes.sum()), self.local.error.shape[-1])
        for position, columns, vectors in self._made(to, len(sizes)):
            written[columns.start - shift[position] : columns.stop - shift[position]] = vectors
        return written

    def _constant(self, layer: int) -> Float[Tensor, "position d_model"]:
        local, writing = self.local, self.local.writing[layer]
        return writing.apply(local.constant[layer]) + writing.bias + local.attention[layer].constant
