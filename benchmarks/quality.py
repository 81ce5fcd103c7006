"""Transcoders of the lab model trained on the same activations, side by side: ours, peers', the shipped one.

    python -m benchmarks.quality                             # about 80 minutes
    python -m benchmarks.quality --tokens 2_000_000 --row "cross-layer"
    python -m benchmarks.quality --peer ~/peer/bin/python    # and the peers this Python has (see quality_peer.py)

One site for every distinct prefix of the lab's training prompts, as for the transcoder that ships; the trainer is that
of `trace train`. Measured on the lab's held-out prompts as `trace evaluate` does: as trained, and with all thresholds
times one number, so that k features a layer fire at a training site on average (those of BatchTopK let more or fewer).
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality_peer import PEERS
from benchmarks.training import ways_of
from examples.lab.learner import ActivationBatch
from examples.lab.measure import Lab, load_model
from examples.lab.transcoder import SITES_PER_STEP, Sites, chosen_sites, collect_sites, site_batches
from examples.lab.world import questions, read_world
from tracer import lab
from tracer.evaluation import evaluate
from tracer.evaluation_report import evaluation_record
from tracer.material import Material, material_of_prompts
from tracer.replacement import ReplacementModel
from transcoders import CrossLayerTranscoder, TrainConfig, load
from transcoders.checkpoint import as_stored, in_memory
from transcoders.objective import learning_rate_at
from transcoders.parallel import Place
from transcoders.scales import Scales, folded, measure_scales
from transcoders.shuffle import Batch
from transcoders.train import Reporting, learn, shape_of

CROSS = TrainConfig(n_features=1024, k=10, batch_tokens=SITES_PER_STEP, buffer_tokens=2 * SITES_PER_STEP)
ROWS = {
    "cross-layer": CROSS,
    # 6 layers: a cross-layer feature has 1 + 3.5 vectors on average, a per-layer feature 2
    "per-layer, as many parameters": replace(CROSS, cross_layer=False, n_features=2304),
    "per-layer, as many features": replace(CROSS, cross_layer=False),
}
LEARNING_RATES = (1e-3, 3e-3, 6e-3)
SHIPPED = "the shipped one (trained beside the model)"
COLUMNS = (
    "transcoder", "rate", "parameters", "scaled", "L0", "NMSE", "error", "dead", "top-1", "KL", "replacement",
    "completeness",
)  # fmt: skip
N_PROMPTS = 1000


@click.command()
@click.option("--tokens", default=4_000_000, show_default=True, help="Of each run.")
@click.option("--row", "rows", multiple=True, type=click.Choice([*ROWS, SHIPPED]), help="Only these; repeatable.")
@click.option("--learning-rate", "rates", multiple=True, type=float, default=LEARNING_RATES, show_default=True)
@click.option("--graphs", default=60, show_default=True, help="Prompts to trace.")
@click.option("--peer", "peers", multiple=True, type=click.Path(exists=True, dir_okay=False), help="Its Python.")
def main(tokens: int, rows: tuple[str, ...], rates: tuple[float, ...], graphs: int, peers: tuple[str, ...]) -> None:
    """Train every kind with each learning rate, and print what `trace evaluate` measures of the best of each."""
    table = Table(*COLUMNS)
    world = read_world()
    opened = Lab(world, questions(world), *load_model(str(lab.folder() / "model")))
    model = ReplacementModel.load(lab.folder() / "model", lab.folder() / "transcoder")
    held_out = [question.prompt for question in opened.questions if question.split != "train"]
    chosen = np.random.default_rng(0).choice(len(held_out), N_PROMPTS, replace=False).tolist()
    material = material_of_prompts(model, [held_out[i] for i in chosen], "held-out questions", graphs)
    sites = collect_sites(opened, 0)
    ways: dict[str, Callable[[TrainConfig], CrossLayerTranscoder]] = {}
    for name in ROWS:
        if name in (rows or ROWS):
            ways[name] = partial(_trained, opened, sites)
    for peer in peers:
        for way in ways_of(peer):
            if way in PEERS:
                ways[way] = partial(_trained_by_peer, peer, way, opened, sites)
    for name, trained in ways.items():
        runs = []
        for rate in rates:
            config = replace(ROWS.get(name, CROSS), learning_rate=rate, tokens=tokens)
            transcoder = trained(config)
            judged = _judged(model, transcoder, material)
            both = [_told(name, f"{rate:g}", "1", judged)]
            scaled, scale = _at_l0(transcoder, sites, config.k)
            both.append(_told("", "", f"{scale:.2f}", _judged(model, scaled, material)))
            runs.append((judged["graphs"]["replacement"], both))
        for row in max(runs)[1]:
            table.add_row(*row)
    if SHIPPED in (rows or (SHIPPED,)):
        table.add_row(*_told(SHIPPED, "", "", _judged(model, load(lab.folder() / "transcoder"), material)))
    Console(width=160).print(table)


@dataclass
class _SiteStream:
    """The batches that the shipped transcoder learns from, scaled; a run of this benchmark is never resumed."""

    batches: Iterator[ActivationBatch]
    scales: Scales
    device: torch.device

    def next(self, n: int) -> Batch:
        inputs, outputs = next(self.batches)
        inputs, outputs = inputs * self.scales.inputs[:, None, None], outputs * self.scales.outputs[:, None, None]
        return Batch(inputs, outputs, torch.ones(n, dtype=torch.int64))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {}

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError("this benchmark's runs are never resumed")


def _trained(opened: Lab, sites: Sites, config: TrainConfig) -> CrossLayerTranscoder:
    scales = measure_scales(sites.inputs, sites.outputs)
    stream = _SiteStream(site_batches(sites, config.seed), scales, torch.device("cpu"))
    first = torch.randperm(sites.inputs.shape[1], generator=torch.Generator().manual_seed(1))[:16_384]
    seen = sites.inputs[:, first], sites.outputs[:, first], torch.ones(len(first), dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        learn(
            {0: stream}, scales, seen, shape_of(opened.model, config, "lab"), config, Path(folder),
            place=Place(), reporting=Reporting(report_every=200, checkpoint_every=1 << 30, on_report=_note),
        )  # fmt: skip
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return load(Path(folder) / "transcoder")


def _trained_by_peer(python: str, way: str, opened: Lab, sites: Sites, config: TrainConfig) -> CrossLayerTranscoder:
    """Trained on the same batches, scaled as ours."""
    scales = measure_scales(sites.inputs, sites.outputs)
    batches = torch.stack([*islice(chosen_sites(sites, config.seed), config.steps)])
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "sites.safetensors", Path(folder) / "trained.safetensors"
        inputs, outputs = sites.inputs * scales.inputs[:, None, None], sites.outputs * scales.outputs[:, None, None]
        rates = torch.tensor([learning_rate_at(config, step + 1) for step in range(config.steps)])
        save_file({"inputs": inputs, "outputs": outputs, "batches": batches, "rates": rates}, file)
        start = time.perf_counter()
        subprocess.run(
            [python, "-m", "benchmarks.quality_peer", str(file), way, str(output), f"--features={config.n_features}",
             f"--k={config.k}", f"--clip={config.clip}", f"--threads={torch.get_num_threads()}"],
            cwd=Path(__file__).parent.parent, stdout=sys.stderr, check=True,
        )  # fmt: skip
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        shape = replace(shape_of(opened.model, config, "lab"), activation="jumprelu")
        transcoder = CrossLayerTranscoder(shape)
        transcoder.load_state_dict(load_file(output))
    return in_memory(folded(as_stored(transcoder), scales))


def _note(row: dict[str, Any]) -> None:
    known = {name: value for name, value in row.items() if isinstance(value, float | int)}
    print("  ".join(f"{name} {value:.4g}" for name, value in known.items()), file=sys.stderr, flush=True)


def _at_l0(transcoder: CrossLayerTranscoder, sites: Sites, k: int) -> tuple[CrossLayerTranscoder, float]:
    """The same with thresholds times a number, found by halves, so that k features a layer fire, or as many as can."""
    some = torch.randperm(sites.inputs.shape[1], generator=torch.Generator().manual_seed(2))[:8192]
    pre_activation = transcoder.pre_activations(sites.inputs[:, some])
    low, high = 0.0, 4.0
    for _ in range(20):
        scale = (low + high) / 2
        fires = (pre_activation > scale * transcoder.threshold[:, None]).sum(-1).float().mean()
        low, high = (scale, high) if fires > k else (low, scale)
    scaled = deepcopy(transcoder)
    scaled.threshold *= scale
    return scaled, scale


def _judged(model: ReplacementModel, transcoder: CrossLayerTranscoder, material: Material) -> dict[str, Any]:
    n_parameters = transcoder.W_enc.numel() + sum(decoder.numel() for decoder in transcoder.W_dec)
    judged = evaluation_record(evaluate(replace(model, transcoder=transcoder), material))
    return judged | {"parameters": n_parameters}


def _told(name: str, rate: str, scaled: str, judged: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table, and at once a line on stderr."""
    cells = (
        name, rate, f"{judged['parameters'] / 1e6:.2f} M", scaled, f"{judged['l0']:.1f}", f"{judged['nmse']:.4f}",
        f"{judged['relative_error']:.4f}", f"{judged['dead']:.2f}", f"{judged['top1_match']:.4f}",
        f"{judged['kl']:.3f}", f"{judged['graphs']['replacement']:.3f}", f"{judged['graphs']['completeness']:.3f}",
    )  # fmt: skip
    print(" | ".join(cells), file=sys.stderr, flush=True)
    return cells


if __name__ == "__main__":
    main()
