"""Rows of the attribution graph, top down; influence falls out of the rows, and says when to stop.

No edge joins two features of one layer, and a row's shares are known once the row is complete. So the influence of a
layer's features is final before their own rows are computed: the most influential are attributed until at most
1 − coverage of the layer's influence is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracer.errors import TraceError
from tracer.replacement import LocalReplacementModel, linear_logits
from tracer.targets import Targets


@dataclass(frozen=True)
class Rows:
    """Direct effects on the attributed targets; columns are active features | errors (layer-major) | tokens."""

    target: Int[Tensor, " row"]
    """Number among the active features, or n_active + k for the k-th explained target."""
    effect: Float[Tensor, "row source"]
    bias: Float[Tensor, " row"]
    influence: Float[Tensor, " source"]
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
    sources: "Sources | None" = None,
    coverage: float = 0.99,
    max_features: int | None = None,
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] = ignore,
) -> Rows:
    """Direct effects of every source on the targets and on the features that matter ("Circuit Tracing", section 3).

    `sources` are those of this prompt, prepared once by whoever explains several targets one after the other.
    """
    features = local.features
    sources = sources or Sources(local)
    if sources.local is not local:
        raise TraceError("the sources are those of another prompt; prepare this one's with Sources(local).")
    n_active = len(features.layer)
    wide = torch.float64
    influence = torch.zeros(sources.n_sources, dtype=wide, device=local.error.device)
    wanted, effects, biases, values = [], [], [], []

    def add(rows: Int[Tensor, " row"], effect: Tensor, bias: Tensor, value: Tensor, weight: Tensor) -> None:
        nonlocal influence
        size = effect.abs().to(wide)
        share = size / size.sum(1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        influence = influence + weight.to(wide) @ share
        wanted.append(rows)
        effects.append(effect)
        biases.append(bias)
        values.append(value)

    for part, effect, bias in _target_rows(local, sources, targets, batch_size):
        add(n_active + part, effect, bias, targets.value[part], targets.weight[part])
    left = max_features
    skipped, worst, done = 0.0, 0.0, 0
    for layer in reversed(range(local.n_layers)):
        here = (features.layer == layer).nonzero()[:, 0]
        # What a layer does not use of its share of the limit is left to those below.
        limit = len(here) if left is None else -(-left // (layer + 1))
        chosen = _most_influential(influence[here], coverage, limit)
        total = float(influence[here].sum())
        missed = float(influence[here][~chosen].sum())
        skipped += missed
        worst = max(worst, missed / total if total else 0.0)
        rows = here[chosen]
        left = None if left is None else left - len(rows)
        rows = rows[features.position[rows].argsort(stable=True)]  # short cotangents together
        for part in rows.split(batch_size) if len(rows) else ():
            effect, bias = _feature_rows(local, sources, layer, part)
            add(part, effect, bias, features.pre_activation[part], influence[part])
            done += len(part)
            on_progress(done, n_active)
    target, effect, bias = torch.cat(wanted), torch.cat(effects), torch.cat(biases)
    rows = Rows(
        target, effect, bias, influence, 1 - worst, skipped,
        _conservation_error(effect, bias, torch.cat(values)), sources.logits_error,
    )  # fmt: skip
    _check(rows, local.error.dtype)
    return rows


class Sources:
    """What each layer's MLP output is made of, position by position, ready for matrix products: one per prompt.

    Active features are renumbered by position, then layer: at a given layer those of one position that can write
    there are one contiguous block of columns.
    """

    @torch.no_grad()
    def __init__(self, local: LocalReplacementModel) -> None:
        self.local = local
        features, n_layers, n_positions = local.features, local.n_layers, local.n_positions
        self.n_active = len(features.layer)
        self.n_sources = self.n_active + n_layers * n_positions + n_positions
        self.order = (features.position * n_layers + features.layer).argsort(stable=True)
        position, layer = features.position[self.order], features.layer[self.order]
        key = position * n_layers + layer
        firsts = torch.arange(n_positions, device=key.device) * n_layers
        sources = [local.transcoder.config.sources(to) for to in range(n_layers)]
        self.start: list[list[int]] = [torch.searchsorted(key, firsts + s.start).tolist() for s in sources]
        self.end: list[list[int]] = [torch.searchsorted(key, firsts + s.stop).tolist() for s in sources]
        """[layer][position]: the block of features of that position that may write to that layer."""
        self.first = torch.searchsorted(features.layer, torch.arange(n_layers, device=key.device)).tolist()
        """[layer]: the number of its first active feature."""
        self.writes = [self._writes(local, to) for to in range(n_layers)]
        self.logits_error = _logits_error(local)
        """Law 1 is about the prompt, whatever is explained: checked once."""

    def _writes(self, local: LocalReplacementModel, to: int) -> list[Tensor]:
        """Per position the write vectors (activation × decoder row) into the MLP output of layer `to`."""
        features = local.features
        blocks = []
        for start, end in zip(self.start[to], self.end[to], strict=True):
            block = torch.empty(end - start, local.error.shape[-1], dtype=local.error.dtype, device=local.error.device)
            numbers = self.order[start:end]
            for source in local.transcoder.config.sources(to):
                rows = (features.layer[numbers] == source).nonzero()[:, 0]
                chosen = numbers[rows] - self.first[source]
                block[rows] = local.decoders[source][chosen, to - source].to(block.dtype)
            blocks.append(block * features.activation[numbers, None])
        return blocks


def _target_rows(
    local: LocalReplacementModel, sources: Sources, targets: Targets, batch_size: int
) -> Iterator[tuple[Int[Tensor, " row"], Tensor, Tensor]]:
    """Numbers, rows and biases of the explained targets, those of one layer together."""
    layer, position = torch.tensor([targets.layers, targets.positions], device=local.error.device)
    for top in layer.unique().tolist():
        for part in (layer == top).nonzero()[:, 0].split(batch_size):
            yield part, *_rows(local, sources, top, position[part], targets.direction[part], targets.bias[part])


def _feature_rows(
    local: LocalReplacementModel, sources: Sources, layer: int, rows: Int[Tensor, " row"]
) -> tuple[Tensor, Tensor]:
    """Rows of some active features of one layer."""
    transcoder, feature = local.transcoder, local.features.feature[rows]
    dtype = local.error.dtype
    encoder, bias = transcoder.W_enc[layer][feature].to(dtype), transcoder.b_enc[layer][feature].to(dtype)
    return _rows(local, sources, layer, local.features.position[rows], encoder, bias)


def _rows(
    local: LocalReplacementModel,
    sources: Sources,
    layer: int,
    position: Int[Tensor, " row"],
    direction: Float[Tensor, "row d_model"],
    reader_bias: Float[Tensor, " row"],
) -> tuple[Tensor, Tensor]:
    """Rows of directions that a layer's encoder reads, or above the last layer what the unembedding reads.

    The first step down touches one position each; the highest of them bounds all that follows.
    """
    is_output = layer == local.n_layers
    norm = local.final_norm if is_output else local.reading[layer]
    read = norm.transpose_at(direction, position)
    n = int(position.max()) + 1
    cotangent = read.new_zeros(len(position), n, read.shape[-1])
    cotangent[torch.arange(len(position)), position] = read
    effect, bias = _empty_rows(cotangent, sources)
    bias += direction @ norm.bias + reader_bias
    if not is_output and not local.parallel:
        cotangent += local.attention[layer].transpose_at(read, position, n)
        bias += (read * local.attention[layer].constant[position]).sum(1)
    _sweep(local, sources, layer, cotangent, effect, bias)
    return _in_order(effect, sources), bias


def _sweep(
    local: LocalReplacementModel, sources: Sources, top: int, cotangent: Tensor, effect: Tensor, bias: Tensor
) -> None:
    """Carry cotangents from the input of layer `top` down to the embeddings and read them at every source."""
    n = cotangent.shape[1]
    n_positions = local.n_positions
    for layer in reversed(range(top)):
        written = local.writing[layer].transpose(cotangent)
        for position in range(n):
            start, end = sources.start[layer][position], sources.end[layer][position]
            effect[:, start:end].addmm_(written[:, position], sources.writes[layer][position].T)
        column = sources.n_active + layer * n_positions
        effect[:, column : column + n] = torch.einsum("bpd,pd->bp", written, local.error[layer, :n])
        bias += torch.einsum("bpd,pd->b", written, local.constant[layer, :n])
        bias += cotangent.sum(1) @ local.writing[layer].bias
        skipped, skipped_bias = _through_skip(local, layer, written)
        moved = cotangent if local.parallel else cotangent + skipped
        bias += torch.einsum("bpd,pd->b", moved, local.attention[layer].constant[:n]) + skipped_bias
        cotangent = cotangent + skipped + local.attention[layer].transpose(moved)
    column = sources.n_active + local.n_layers * n_positions
    effect[:, column : column + n] = torch.einsum("bpd,pd->bp", cotangent, local.embedding[:n])
    bias += torch.einsum("bpd,pd->b", cotangent, local.position_embedding[:n])


def _through_skip(local: LocalReplacementModel, layer: int, written: Tensor) -> tuple[Tensor, Tensor | float]:
    """Cotangents at what the transcoder writes → at the residual stream it reads, and what the norm's bias adds."""
    W_skip = local.transcoder.W_skip
    if W_skip is None:
        return torch.zeros_like(written), 0.0
    read = written @ W_skip[layer].T.to(written.dtype)
    return local.reading[layer].transpose(read), read.sum(1) @ local.reading[layer].bias


def _empty_rows(cotangent: Tensor, sources: Sources) -> tuple[Tensor, Tensor]:
    return cotangent.new_zeros(len(cotangent), sources.n_sources), cotangent.new_zeros(len(cotangent))


def _in_order(effect: Tensor, sources: Sources) -> Tensor:
    """Columns back to the order of the active features."""
    result = effect.clone()
    result[:, sources.order] = effect[:, : sources.n_active]
    return result


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


def _conservation_error(effect: Tensor, bias: Tensor, value: Tensor) -> float:
    wide = effect.double()
    size = wide.abs().sum(1) + bias.abs()
    return float(((wide.sum(1) + bias - value).abs() / size.clamp(min=1e-30)).max())


def _logits_error(local: LocalReplacementModel) -> float:
    return float((linear_logits(local) - local.logits).abs().max() / local.logits.abs().max().clamp(min=1e-30))


def _check(rows: Rows, dtype: torch.dtype) -> None:
    """Laws 1 and 2, on every trace."""
    allowed = 1e-5 if dtype == torch.float64 else 1e-3  # Transformers computes norms in float32 at best
    for law, error in (("logits", rows.logits_error), ("conservation", rows.conservation_error)):
        if not error <= allowed:  # also when it is NaN
            raise TraceError(
                f"the {law} check failed: relative error {error:.1e}, at most {allowed:.0e} allowed; the graph would "
                "be wrong. Check the model and transcoder weights for NaN, or use dtype float32 or float64."
            )
