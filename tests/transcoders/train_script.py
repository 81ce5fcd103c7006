"""Trains a tiny transcoder, alone or under torchrun; run by test_train.py and test_parallel.py, not by pytest."""

import os
import resource
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.tracer.conftest import tiny_llama, tiny_tokenizer
from tests.transcoders.test_train import SMALL, texts
from transcoders import TrainConfig, TranscoderConfig, TranscoderError
from transcoders.corpus import tokens_corpus
from transcoders.fingerprint import fingerprint
from transcoders.interrupts import asked_to_stop
from transcoders.parallel import Place, joined
from transcoders.run import started
from transcoders.scales import measure_scales
from transcoders.train import Reporting, Stopped, train_to_folder


def pause_or_die(flags: list[str], step: int, steps: int) -> None:
    """Give others time to interfere; the last of several processes is killed at one step."""
    time.sleep(0.05 if "--slow" in flags else 0.0)
    if step == number(flags, "disk-full-at"):
        fill_disk(20_000)
    if step == number(flags, "metrics-full-at"):
        fill_disk(500)
    if step == number(flags, "die-at") and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def is_asked_at_once(flags: list[str]) -> bool:
    """Whether the last of several processes is to end before it has begun."""
    return "--asked-at-once" in flags and os.environ.get("RANK") == "1"


def fill_disk(size: int) -> None:
    """From now on no file can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def number(flags: list[str], name: str) -> int | None:
    """The value of --name=value."""
    return next((int(flag.split("=")[1]) for flag in flags if flag.startswith(f"--{name}=")), None)


def write_start(config: TrainConfig, place: Place, folder: Path) -> None:
    """Write which weights this process starts from, though each one looks for features by chance numbers of its own."""
    inputs, outputs = torch.randn(2, 3, 200, 16, generator=torch.Generator().manual_seed(0))
    config = replace(config, seed=place.data_part)
    run = started(
        TranscoderConfig(3, 16, 48, "relu"), config, measure_scales(inputs, outputs),
        (inputs, outputs, torch.ones(200, dtype=torch.int64)), place, lambda: None,
    )  # fmt: skip
    (folder / f"start-{place.data_part}").write_text(fingerprint(run.weights.transcoder))


def main() -> None:
    torch.set_num_threads(1)
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    config = replace(SMALL, streams=2) if "--streams" in flags else SMALL
    if "--full-from-the-start" in flags:
        fill_disk(2000)
    try:
        with asked_to_stop() as asked, joined(number(flags, "shards"), "cpu") as place:
            reporting = Reporting(
                report_every=number(flags, "report-every") or 1, checkpoint_every=5,
                should_stop=lambda: bool(asked) or is_asked_at_once(flags), on_step=partial(pause_or_die, flags),
            )  # fmt: skip
            if "--start-only" in flags:
                write_start(config, place, folder)
                return
            model = tiny_llama(0).requires_grad_(False)
            train_to_folder(model, tiny_tokenizer(), tokens_corpus(texts(), "texts"), config, folder, place=place,
                  reporting=reporting)  # fmt: skip
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(3)
    except TranscoderError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
