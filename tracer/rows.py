"""Rows of the attribution graph, top down; influence falls out of the rows, and says when to stop.

No edge joins two features of one layer, and a row's shares are known once the row is complete. So the influence of a
layer's features is final before their own rows are computed: the most influential are attributed until at most
1 − coverage of the layer's influence is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int, Int32
from torch import Tensor

from tracer.errors import TraceError
from tracer.local import LocalReplacementModel
from tracer.sources import Sources
from tracer.sweep import effects, feature_effects
from tracer.targets import Targets
from transcoders.memory import free_memory

CELLS = 1 << 19
"""Numbers in a batch of cotangents: enough for full speed, few enough for a processor's cache."""
FEWEST = 16
"""Rows in a batch even if that is more: what is made on the way for a long prompt is made once for all of them."""
ENTRY = 16
"""Bytes that an entry takes on its way into a graph."""
KEPT = 0.999
"""Share of Σ|row| that is kept where all entries would take more than half of the free memory."""
BLOCK = 1 << 26
"""Bytes; what is larger than 32 MB malloc gives a place of its own, which the system gets back when it is freed."""


@dataclass(frozen=True)
class Rows:
    """Direct effects on the attributed targets, row after row; both targets and sources in the order of graph nodes."""

    target: Int[Tensor, " row"]
    """Number among the active features, or n_active + k for the k-th explained target."""
    start: Int[Tensor, " row_and_end"]
    """Where each row's entries start; last, how many there are."""
    source: Int32[Tensor, " entry"]
    effect: Float[Tensor, " entry"]
    bias: Float[Tensor, " row"]
    """With `remainder`: row and bias add up to the target's value."""
    remainder: Float[Tensor, " row"]
    """Sum of the entries that were left out as too small."""
    input_size: Float64[Tensor, " row"]
    """Σ|row|, of all entries."""
    row_share: float
    """Share of Σ|row| that each row's entries hold at least."""
    influence: Float64[Tensor, " source"]
    """Influence of every source on the explained targets, exact for the rows there are."""
    coverage: float
    """1 − the largest share of a layer's influence that was left out."""
    skipped_influence: float
    """Influence of the features left without rows: no node's influence is understated by more."""
    conservation_error: float
    """Largest |Σ row + bias − pre-activation| as a share of Σ |row| + |bias|."""
    logits_error: float
    """Largest difference between the linear model's logits and the model's, as a share of the largest logit."""


def ignore(done: int, total: int) -> None:
    """A progress callback that does nothing."""


@torch.no_grad()
def attribution_rows(
    local: LocalReplacementModel,
    targets: Targets,
    *,
    sources: Sources | None = None,
    coverage: float = 0.99,
    max_features: int | None = None,
    row_share: float | None = None,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] = ignore,
) -> Rows:
    """Direct effects of every source on the targets and on the features that matter ("Circuit Tracing", section 3).

    `sources` are those of this prompt, prepared once by whoever explains several targets one after the other;
    `row_share` keeps of each row the largest entries that hold so much of Σ|row|: by default all of them, or 0.999
    where they would not fit into memory. `batch_size` is the number of rows computed at once, by default what suits the
    prompt's length.
    """
    features = local.features
    sources = sources or Sources(local)
    if sources.local is not local:
        raise TraceError("the sources are those of another prompt; prepare this one's with Sources(local).")
    if row_share is not None and not 0 < row_share <= 1:
        raise TraceError(f"row_share is {row_share}; expected a share above 0 and up to 1.")
    found = _Found(sources, _affordable(sources, max_features) if row_share is None else row_share)
    for part in _target_batches(targets, local.error.shape[-1], batch_size):
        layer, position = targets.layers[part[0]], torch.tensor([targets.positions[k] for k in part])
        position = position.to(local.error.device)
        effect, bias = effects(local, sources, layer, position, targets.direction[part], targets.bias[part])
        for row, k in enumerate(part):
            one = slice(row, row + 1)
            found.add(
                (layer, 1, targets.positions[k], targets.features[k], k), torch.tensor([sources.n_active + k]),
                layer, targets.positions[k], effect[one], bias[one], targets.value[k : k + 1],
                targets.weight[k : k + 1],
            )  # fmt: skip
    left = max_features
    skipped, worst, done = 0.0, 0.0, 0
    for layer in reversed(range(local.n_layers)):
        here = (features.layer == layer).nonzero()[:, 0]
        influence = found.influence_of(sources.number[here])
        # What a layer does not use of its share of the limit is left to those below.
        limit = len(here) if left is None else -(-left // (layer + 1))
        chosen = _most_influential(influence, coverage, limit)
        total, missed = float(influence.sum()), float(influence[~chosen].sum())
        skipped += missed
        worst = max(worst, missed / total if total else 0.0)
        rows = here[chosen.to(here.device)]
        left = None if left is None else left - len(rows)
        for part in _feature_batches(rows, features.position, local.error.shape[-1], batch_size):
            effect, bias = feature_effects(local, sources, layer, part)
            for position, run in _runs(features.position[part]):
                row = part[run]
                found.add(
                    (layer, 0, int(row[0]), 0, 0), row, layer, position, effect[run], bias[run],
                    features.pre_activation[row], found.influence_of(sources.number[row]),
                )  # fmt: skip
            done += len(part)
            on_progress(done, sources.n_active)
    rows = found.rows(1 - worst, skipped)
    _check(rows, local.error.dtype)
    return rows


@dataclass(frozen=True)
class _Part:
    """Rows of targets at one layer and position."""

    place: tuple[int, ...]
    """Where among all rows they belong."""
    target: Int[Tensor, " row"]
    count: Int[Tensor, " row"]
    source: Int32[Tensor, " each"]
    """Of every entry, or where the rows have the same sources, of one row's."""
    effect: Float[Tensor, " entry"]
    bias: Float[Tensor, " row"]
    remainder: Float[Tensor, " row"]
    input_size: Float64[Tensor, " row"]


class _Blocks:
    """Memory of many small tensors: one by one on the heap, they would leave holes behind that nothing fits into."""

    def __init__(self) -> None:
        self._free = torch.empty(0)

    def room(self, n: int, dtype: torch.dtype) -> Tensor:
        """Where the next n numbers go."""
        if len(self._free) < n or self._free.dtype != dtype:
            self._free = torch.empty(max(n, BLOCK // dtype.itemsize), dtype=dtype)
        return self._free[:n]

    def kept(self, values: Tensor) -> Tensor:
        """The values in a processor's memory, one after the other; those that are in their room already stay there."""
        place = self.room(values.numel(), values.dtype)
        if values.data_ptr() != place.data_ptr():
            place.copy_(values.flatten())
        self._free = self._free[values.numel() :]
        return place


class _Found:
    """The rows so far, and the influence that follows from them."""

    def __init__(self, sources: Sources, row_share: float) -> None:
        self._sources = sources
        self._row_share = row_share
        self._parts: list[_Part] = []
        self._effects, self._entries = _Blocks(), _Blocks()
        # Apple's GPUs have no float64: there sums are made by the processor
        self.device = torch.device("cpu") if sources.column.device.type == "mps" else sources.column.device
        self._column = sources.column.to(self.device)
        self._conservation_error = torch.zeros((), dtype=torch.float64, device=self.device)
        self.influence = torch.zeros(sources.n_sources, dtype=torch.float64, device=self.device)

    def add(
        self, place: tuple[int, ...], target: Int[Tensor, " row"], layer: int, position: int,
        effect: Float[Tensor, "row column"], bias: Float[Tensor, " row"], value: Float[Tensor, " row"],
        weight: Float[Tensor, " row"],
    ) -> None:  # fmt: skip
        """Rows of targets at one layer and position; `place` says where among all rows they belong."""
        source = self._sources.below(layer, position + 1).to(self.device)
        effect, bias, value, weight = (part.to(self.device) for part in (effect, bias, value, weight))
        room = self._effects.room(len(effect) * len(source), effect.dtype) if effect.is_cpu else None
        effect = torch.index_select(
            effect, 1, self._column[source], out=None if room is None else room.view(len(effect), -1)
        )
        size = effect.abs()
        whole = size.sum(1, dtype=torch.float64)
        share = weight.double() / whole.clamp(min=torch.finfo(torch.float64).tiny)
        self.influence[source] += share @ size.double()
        missing = (effect.sum(1, dtype=torch.float64) + bias - value).abs() / (whole + bias.abs()).clamp(min=1e-30)
        self._conservation_error = torch.maximum(self._conservation_error, missing.max())
        count, entries, remainder = torch.full((len(effect),), len(source)), source.int(), torch.zeros_like(bias)
        exists = effect != 0
        if self._row_share < 1:
            exists &= _largest(size, whole * self._row_share)
            remainder = torch.where(exists, 0, effect).sum(1, dtype=torch.float64).to(bias)
        if not bool(exists.all()):
            count, entries, effect = exists.sum(1), entries.expand(len(effect), -1)[exists], effect[exists]
        self._parts.append(
            _Part(
                place, target.cpu(), count.cpu(), self._entries.kept(entries), self._effects.kept(effect),
                (bias + remainder).cpu(), remainder.cpu(), whole.cpu(),
            )
        )  # fmt: skip

    def influence_of(self, source: Int[Tensor, " some"]) -> Float64[Tensor, " some"]:
        """Influence so far of some of the sources."""
        return self.influence[source.to(self.device)]

    def rows(self, coverage: float, skipped_influence: float) -> Rows:
        """All of them in the order of graph nodes; there are none to add after that."""
        self._parts.sort(key=lambda part: part.place)
        target = torch.cat([part.target for part in self._parts])
        start = torch.nn.functional.pad(torch.cat([part.count for part in self._parts]).cumsum(0), (1, 0))
        bias, remainder, input_size = (
            torch.cat([getattr(part, name) for part in self._parts]) for name in ("bias", "remainder", "input_size")
        )
        source = torch.empty(int(start[-1]), dtype=torch.int32)
        end = 0
        for part in self._parts:
            first, end = end, end + len(part.effect)
            if first < end:  # a target without any input has no edges
                source[first:end].view(-1, len(part.source)).copy_(part.source)
        effect = torch.cat([part.effect for part in self._parts])
        self._parts.clear()
        return Rows(
            target, start, source, effect, bias, remainder, input_size, self._row_share, self.influence, coverage,
            skipped_influence, float(self._conservation_error), self._sources.logits_error,
        )  # fmt: skip


def _affordable(sources: Sources, max_features: int | None) -> float:
    """The share of each row that there is memory for even if all features get rows: all, or nearly all."""
    features, n_positions = sources.local.features, sources.local.n_positions
    place = (sources.layer + 1) * n_positions + sources.position
    counts = torch.bincount(place, minlength=(sources.local.n_layers + 1) * n_positions).view(-1, n_positions)
    seen = counts.cumsum(0).cumsum(1)[features.layer, features.position]
    most = seen if max_features is None else seen.sort(descending=True).values[:max_features]
    return 1.0 if int(most.sum()) * ENTRY <= free_memory(torch.device("cpu")) / 2 else KEPT


def _largest(size: Float[Tensor, "row source"], wanted: Float64[Tensor, " row"]) -> Bool[Tensor, "row source"]:
    """Of each row the largest sizes whose sum is at least what is wanted."""
    ranked = size.sort(dim=1, descending=True).values
    held = ranked.cumsum(1, dtype=torch.float64)
    last = (held < wanted[:, None]).sum(1).clamp(max=size.shape[1] - 1)
    return size >= ranked.gather(1, last[:, None])


def _target_batches(targets: Targets, d_model: int, batch_size: int | None) -> Iterator[list[int]]:
    """Numbers of the explained targets, those of one layer together."""
    for layer in sorted(set(targets.layers)):
        here = sorted((targets.positions[k], k) for k, other in enumerate(targets.layers) if other == layer)
        for first, end in _batches([position for position, _ in here], d_model, batch_size):
            yield [k for _, k in here[first:end]]


def _feature_batches(
    rows: Int[Tensor, " row"], positions: Int[Tensor, " active"], d_model: int, batch_size: int | None
) -> Iterator[Int[Tensor, " row"]]:
    """Features of one layer, in order."""
    for first, end in _batches(positions[rows].tolist(), d_model, batch_size):
        yield rows[first:end]


def _batches(positions: list[int], d_model: int, batch_size: int | None) -> Iterator[tuple[int, int]]:
    """Runs of ascending positions, short cotangents together: as many as fit into so many numbers, or `batch_size`."""
    first = 0
    for end in range(1, len(positions) + 1):
        n = end - first
        full = n == batch_size
        if batch_size is None and end < len(positions):
            full = n >= FEWEST and (n + 1) * (positions[end] + 1) * d_model > CELLS
        if full or end == len(positions):
            yield first, end
            first = end


def _runs(position: Int[Tensor, " row"]) -> Iterator[tuple[int, slice]]:
    """Each position of a sorted list, and where it stands."""
    first = 0
    for value, count in zip(*(part.tolist() for part in position.unique_consecutive(return_counts=True)), strict=True):
        yield value, slice(first, first + count)
        first += count


def _most_influential(influence: Float[Tensor, " feature"], coverage: float, limit: int) -> Bool[Tensor, " feature"]:
    """The fewest features that leave at most 1 − coverage of the influence out, and no more than `limit`."""
    chosen = torch.zeros(len(influence), dtype=torch.bool, device=influence.device)
    order = influence.argsort(descending=True, stable=True)
    if coverage >= 1:
        n = len(order)
    else:
        held = influence[order].cumsum(0)
        n = int((held < coverage * held[-1]).sum()) + 1 if len(order) and held[-1] > 0 else 0
    chosen[order[: max(0, min(n, limit))]] = True
    return chosen


def _check(rows: Rows, dtype: torch.dtype) -> None:
    """Laws 1 and 2, on every trace."""
    allowed = 1e-5 if dtype == torch.float64 else 1e-3  # Transformers computes norms in float32 at best
    for law, error in (("logits", rows.logits_error), ("conservation", rows.conservation_error)):
        if not error <= allowed:  # also when it is NaN
            raise TraceError(
                f"the {law} check failed: relative error {error:.1e}, at most {allowed:.0e} allowed; the graph would "
                "be wrong. Use dtype float32 or float64; if that does not help, weights are damaged, or this is a bug."
            )
