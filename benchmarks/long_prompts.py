"""Time and memory of tracing long prompts on a random model of Llama-3.2-1B's shape.

    python -m benchmarks.long_prompts                      # 288, 575, 1,150 and 2,300 tokens, 64 features attributed
    python -m benchmarks.long_prompts --max-features 256
    python -m benchmarks.long_prompts --device cuda        # and the GPU's peak memory

Weights are bfloat16 unless --dtype says otherwise, sums float32. The files take about 8 GB and are removed at the end.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.attribution import measured
from benchmarks.random_case import LLAMA_1B, write_case, write_prompt

HERE = Path(__file__).parent
SHAPE = replace(LLAMA_1B, n_features=8192, n_tokens=2300)
LENGTHS = (288, 575, 1150, 2300)


@click.command()
@click.option("--max-features", default=64, show_default=True, help="Features to attribute.")
@click.option("--threads", default=2, show_default=True)
@click.option("--tokens", multiple=True, type=int, default=LENGTHS, show_default=True)
@click.option("--layers", default=SHAPE.n_layers, show_default=True)
@click.option("--features", default=SHAPE.n_features, show_default=True, help="A layer.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the model's files here and use them again.")
def main(
    max_features: int, threads: int, tokens: tuple[int, ...], layers: int, features: int, device: str, dtype: str,
    folder: Path | None,
) -> None:  # fmt: skip
    """Print a table: seconds, peak memory and the laws by the number of tokens."""
    shape = replace(SHAPE, n_layers=layers, n_features=features, dtype=dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        if not (folder / "model").exists():
            write_case(shape, folder)
        table = Table("tokens", "active", "edges", "attribution s", "peak MB", "conservation", "coverage", "row share")
        for n in tokens:
            write_prompt(replace(shape, n_tokens=n), folder)
            command = [
                sys.executable, str(HERE / "trace_ours.py"), str(folder), "--repeats=1", f"--threads={threads}",
                f"--device={device}", f"--dtype={dtype}", f"--max-features={max_features}",
            ]  # fmt: skip
            run, _ = measured(command)
            table.add_row(
                f"{n:,}", f"{run['active']:,}", f"{run['edges']:,}", f"{run['attribution_seconds'][0]:.0f}",
                f"{run['peak_mb']:,.0f}", f"{run['conservation_error']:.0e}", f"{run['coverage']:.3f}",
                f"{run['row_share']}",
            )  # fmt: skip
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
