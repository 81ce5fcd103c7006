"""How much memory there is, and whether a training run fits into it."""

import os
from pathlib import Path

import torch

from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.eight_bits import BLOCK
from transcoders.errors import TranscoderError
from transcoders.objective import PENALISED
from transcoders.parallel import Place
from transcoders.start import BLOCK_BYTES
from transcoders.streams import FORWARD_TOKENS, sample_size

GROUPS, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
NUMBER = 4
"""Bytes of a float32 number: gradients, moments and activations are such."""
COPIES_OF_LAYER, COPIES_OF_FEATURES = 5, 6
"""What `start_layer` holds at once: a layer's activations scaled, centred and squared; centres, sums, decoders."""

SPARSE_NUMBERS, PENALISED_NUMBERS = 3, 4
"""Numbers for each token and feature: those of one layer, and what is kept of the pairs of all, ten numbers each. A
penalty makes these rare only by and by: a quarter of all, and dense activations, are counted."""


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device."""
    if device.type == "cuda":  # what torch keeps for the next tensors is free as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(known["MemAvailable"].split()[0]) * 1024
    return min([free, *_free_in_group()])


def _free_in_group() -> list[int]:
    """The same in a container; pages of files that were read count as used there, but make room when asked."""
    for line in GROUPS.read_text().splitlines() if GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        mount, limit, used, total = ROOT, "memory.max", "memory.current", ""
        if "memory" in controllers.split(","):  # version 1 of control groups
            mount, limit, used, total = ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        for group in (mount / path.lstrip("/"), mount):  # the path may be that outside the container
            if (group / limit).exists() and (text := (group / limit).read_text().strip()) != "max":
                pages = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                files = int(pages[f"{total}inactive_file"]) + int(pages[f"{total}active_file"])
                return [int(text) - int((group / used).read_text()) + files]
    return []


def check_start_fits(
    shape: TranscoderConfig, config: TrainConfig, place: Place, device: torch.device, dtype: torch.dtype
) -> None:  # fmt: skip
    """Refuse a run that is to start if memory would run out before it has learnt anything; `dtype` is the model's."""
    start, free = needed_to_start(shape, config, place, dtype), free_memory(device)
    if start > free:
        raise TranscoderError(
            f"features start from {sample_size(config):,} tokens, for which {start / 1e9:.1f} GB are needed and "
            f"{free / 1e9:.1f} GB are free; take fewer features, --dtype bfloat16, or another machine."
        )


def check_fits(shape: TranscoderConfig, config: TrainConfig, place: Place, device: torch.device) -> None:
    """Refuse a run that would end for lack of memory, and say which step would fit."""
    (fixed, per_token), free = needed(shape, config, place), free_memory(device)
    if fixed + per_token * config.batch_tokens // place.data_parts <= free:
        return
    gigabytes = (
        f"{fixed / 1e9:.1f} GB for weights, optimiser and buffer, {per_token / 1e6:.2f} MB for each token of a step"
    )
    fits = int((free - fixed) // per_token) * place.data_parts
    if fits < 64:
        advice = "take fewer features, a smaller --buffer-tokens, --weights bfloat16, --moments 8bit, or more processes"
    else:
        advice = f"--batch-tokens {1 << (fits.bit_length() - 1)} fits"
    raise TranscoderError(f"this run needs {gigabytes}, and {free / 1e9:.1f} GB are free; {advice}.")


def needed(shape: TranscoderConfig, config: TrainConfig, place: Place) -> tuple[int, int]:
    """Bytes that a process needs whatever the step, and for each token of a step."""
    rows = sum(shape.reach(layer) for layer in range(shape.n_layers))
    weights, stored, moments = _weights(shape, config, place)
    token = 2 * shape.n_layers * shape.d_model * NUMBER
    held = config.buffer_tokens // place.data_parts + 2 * FORWARD_TOKENS  # of a pass, as they come and scaled
    fixed = round(weights * (2 * stored + moments)) + held * token
    of_feature = PENALISED_NUMBERS if config.activation in PENALISED else SPARSE_NUMBERS
    features = shape.n_layers * (config.n_features // place.shards) * of_feature * NUMBER
    return fixed, token + features + 2 * rows * shape.d_model * NUMBER


def needed_to_start(shape: TranscoderConfig, config: TrainConfig, place: Place, dtype: torch.dtype) -> int:
    """Bytes that a process needs before the first step, to find features in a sample of the model's activations.

    Every process looks for all features. The sample is let go before the buffer is filled.
    """
    weights, stored, moments = _weights(shape, config, place)
    layer = sample_size(config) * shape.d_model
    sample = 2 * shape.n_layers * layer * dtype.itemsize
    measured = shape.n_layers * layer * NUMBER if dtype.itemsize < NUMBER else 0
    clustered = COPIES_OF_LAYER * layer * NUMBER + COPIES_OF_FEATURES * config.n_features * shape.d_model * NUMBER
    return round(weights * (stored + moments)) + sample + max(measured, clustered + BLOCK_BYTES)


def _weights(shape: TranscoderConfig, config: TrainConfig, place: Place) -> tuple[int, int, float]:
    """How many a process has, bytes of each, and bytes of each one's moments."""
    rows = sum(shape.reach(layer) for layer in range(shape.n_layers))
    n_weights = config.n_features // place.shards * shape.d_model * (shape.n_layers + rows)
    moments = 2 * (1 + NUMBER / BLOCK) if config.moments == "8bit" else 2.0 * NUMBER
    return n_weights, 2 if config.weights == "bfloat16" else NUMBER, moments
