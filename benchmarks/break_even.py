"""At which density a dense product decodes faster than gathering rows, forward and backward: `kernels.BREAK_EVEN`.

python -m benchmarks.break_even
python -m benchmarks.break_even --device cuda --features 16384 --tokens 16384 --width 9216 --dtype bfloat16
"""

from collections.abc import Callable

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import best_seconds
from transcoders.kernels import Selection, decode_densely, gather_decode

DENSITIES = (0.004, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)


@click.command()
@click.option("--features", default=4096, show_default=True)
@click.option("--tokens", default=1024, show_default=True)
@click.option("--width", default=1024, show_default=True, help="d_model times the layers written to.")
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(features: int, tokens: int, width: int, threads: int, device: str, dtype: str) -> None:
    """Print a table: milliseconds of decoding one layer and of its gradient by the share of features that fire."""
    torch.set_num_threads(threads)
    table = Table("density", "sparse ms", "dense ms", "dense / sparse")
    for density in DENSITIES:
        selection, decoder = _case(features, tokens, width, density, device, getattr(torch, dtype))
        sparse = _milliseconds(lambda s, d: gather_decode(s.value, s.token, s.feature, d, tokens), selection, decoder)
        dense = _milliseconds(lambda s, d: decode_densely(s, d, tokens), selection, decoder)
        table.add_row(f"{density:.3f}", f"{sparse:.1f}", f"{dense:.1f}", f"{dense / sparse:.2f}")
    Console(width=80).print(table)


def _case(
    n_features: int, n_tokens: int, width: int, density: float, device: str, dtype: torch.dtype
) -> tuple[Selection, Tensor]:
    """Pairs of features that fire with very different frequencies, as trained ones do."""
    frequency = 1 / torch.arange(1, n_features + 1, device=device) ** 0.7
    feature = torch.multinomial(frequency.expand(n_tokens, n_features), int(density * n_features))
    token = torch.arange(n_tokens, device=device).repeat_interleave(feature.shape[1])
    value = torch.rand(len(token), device=device, requires_grad=True)
    decoder = torch.randn(n_features, width, device=device, dtype=dtype, requires_grad=True)
    return Selection(token, feature.flatten(), value), decoder


def _milliseconds(write: Callable[[Selection, Tensor], Tensor], selection: Selection, decoder: Tensor) -> float:
    def work() -> None:
        written = write(selection, decoder)
        torch.autograd.grad(written, [selection.value, decoder], written.detach())

    return 1000 * best_seconds(work, decoder.device.type, repeats=3)


if __name__ == "__main__":
    main()
