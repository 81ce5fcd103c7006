"""Tokens a second, use of the machine and peak memory of training steps; peers' beside them where they are installed.

    python -m benchmarks.training                                        # ours: sparse and dense
    python -m benchmarks.training --peer ~/peer/bin/python               # and the peers this Python has
    python -m benchmarks.training --device cuda --layers 12 --d-model 768 --features 16384 --tokens 16384 \\
        --cached 65536 --dtype bfloat16                                  # GPT-2 small's shape on one GPU

Every number comes from a process of its own on the same cached activations, in the same batches.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.nn.functional import embedding_bag, gelu

from benchmarks.attribution import measured
from benchmarks.train_ours import WAYS

HERE = Path(__file__).parent
DIRECTIONS = 4
"""Directions that activations are made of, for each dimension."""
DIRECTIONS_A_TOKEN = 12


@dataclass(frozen=True)
class Case:
    """Shape of one run."""

    layers: int
    d_model: int
    features: int
    k: int
    tokens: int
    row_bytes: int
    """Bytes of one number of a gathered row."""
    stored: int = 4
    """Bytes of a weight and of a gradient."""
    moment: int = 4
    """Bytes of one of the optimiser's two numbers for each weight."""

    @property
    def encoder(self) -> int:
        return self.layers * self.d_model * self.features

    @property
    def decoder(self) -> int:
        return self.layers * (self.layers + 1) // 2 * self.d_model * self.features

    def operations(self, way: str, l0: float) -> float:
        """Floating point operations of a step: products with features that did not fire count for dense steps only."""
        fired = l0 / self.features
        if _is_sparse(way):
            return self.tokens * ((2 + 2 * fired) * self.encoder + 6 * fired * self.decoder)
        return self.tokens * (4 * self.encoder + 6 * self.decoder)

    def bytes_moved(self, way: str, l0: float) -> float:
        """Bytes of the optimizer and of gathered rows: for each pair three of a decoder's width and one of inputs."""
        rows = self.tokens * l0 / self.features * (self.encoder + 3 * self.decoder) * self.row_bytes
        optimizer = 4 * self.stored + 4 * self.moment  # gradient, weight and two moments, each written and read
        return optimizer * (self.encoder + self.decoder) + (rows if _is_sparse(way) else 0)


def _is_sparse(way: str) -> bool:
    return way.startswith(("sparse", "trainer"))


@click.command()
@click.option("--layers", default=4, show_default=True)
@click.option("--d-model", default=256, show_default=True)
@click.option("--features", default=4096, show_default=True, help="Features a layer.")
@click.option("--k", default=16, show_default=True, help="Features that fire on a token, a layer.")
@click.option("--tokens", default=1024, show_default=True, help="Tokens a step.")
@click.option("--cached", default=8192, show_default=True, help="Tokens whose activations are cached.")
@click.option("--steps", default=10, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--weights", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="Of ours."
)
@click.option(
    "--moments", type=click.Choice(["float32", "8bit"]), default="float32", show_default=True, help="Of ours."
)
@click.option("--way", "ways", multiple=True, type=click.Choice(WAYS), default=WAYS, show_default=True)
@click.option("--peer", "peers", multiple=True, type=click.Path(exists=True, dir_okay=False), help="Its Python.")
def main(
    layers: int, d_model: int, features: int, k: int, tokens: int, cached: int, steps: int, threads: int, device: str,
    dtype: str, weights: str, moments: str, ways: tuple[str, ...], peers: tuple[str, ...],
) -> None:  # fmt: skip
    """Print a table of training steps of one shape."""
    if cached % tokens:
        raise click.UsageError(f"--cached {cached} is no multiple of --tokens {tokens}; every batch must be whole.")
    case = Case(layers, d_model, features, k, tokens, 2 if dtype == "bfloat16" and device == "cuda" else 4)
    ours = replace(case, stored=2 if weights == "bfloat16" else 4, moment=1 if moments == "8bit" else 4)
    table = Table("step", "L0 a layer", "tokens/s", "of matrix rate", "of bandwidth", "peak MB", "its loss")
    shared = [
        f"--{name}={value}"
        for name, value in {
            "features": features, "k": k, "tokens": tokens, "steps": steps, "threads": threads, "device": device,
            "dtype": dtype,
        }.items()
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "activations.safetensors"
        write_activations(file, layers, cached, d_model)
        for way in ways:
            command = [sys.executable, str(HERE / "train_ours.py"), str(file), f"--way={way}", *shared]
            command += [f"--weights={weights}", f"--moments={moments}"]
            _row(table, ours, f"ours, {way}", way, measured(command)[0])
        for peer in peers:
            for way in ways_of(peer):
                command = [peer, str(HERE / "train_peer.py"), str(file), way, *shared]
                _row(table, case, way, way, measured(command)[0])
    Console(width=130).print(table)


def write_activations(file: Path, n_layers: int, n_tokens: int, d_model: int) -> None:
    """MLP inputs made of a few directions a token, few of them frequent as in language, and outputs of random MLPs."""
    generator = torch.Generator().manual_seed(0)
    n_directions = DIRECTIONS * d_model
    frequency = (1 / torch.arange(1, n_directions + 1)).expand(n_tokens, n_directions)
    inputs, outputs = [], []
    for _ in range(n_layers):
        directions = torch.randn(n_directions, d_model, generator=generator) / d_model**0.5
        up = 3 * torch.randn(d_model, 2 * d_model, generator=generator) / d_model**0.5
        down = torch.randn(2 * d_model, d_model, generator=generator) / d_model**0.5
        chosen = torch.multinomial(frequency, DIRECTIONS_A_TOKEN, generator=generator)
        strength = 0.5 + torch.rand(chosen.shape, generator=generator)
        x = embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
        inputs.append(x + 0.02 * torch.randn(x.shape, generator=generator))
        outputs.append(gelu(inputs[-1] @ up) @ down)
    save_file({"inputs": torch.stack(inputs), "outputs": torch.stack(outputs)}, file)


def ways_of(peer: str) -> list[str]:
    """The peers that this Python has."""
    ways, _ = measured([peer, str(HERE / "train_peer.py"), "--list"])
    if not ways["ways"]:
        raise click.UsageError(f"{peer} has none of the peers that benchmarks/train_peer.py knows; see its docstring.")
    return ways["ways"]


def _row(table: Table, case: Case, name: str, way: str, run: dict) -> None:
    seconds = median(run["seconds"])
    matrix = case.operations(way, run["l0"]) / seconds / run["matrix_rate"]
    bandwidth = case.bytes_moved(way, run["l0"]) / seconds / run["bandwidth"]
    # what a peer that is sparse in part computes cannot be known from outside
    shares = ("", "") if "CSR" in way else (f"{matrix:.0%}", f"{bandwidth:.0%}")
    table.add_row(
        name, f"{run['l0']:.1f}", f"{case.tokens / seconds:,.0f}", *shares, f"{run['peak_mb']:,.0f}",
        f"{run['loss']:.3f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
