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
from transcoders import TranscoderError, train
from transcoders.corpus import tokens_corpus
from transcoders.interrupts import asked_to_stop
from transcoders.parallel import joined
from transcoders.train import Reporting, Stopped


def pause_or_die(pause: float, dies_at: int | None, disk_full_at: int | None, step: int, steps: int) -> None:
    """Give others time to interfere; the last of several processes is killed at one step."""
    time.sleep(pause)
    if step == disk_full_at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    if step == dies_at and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def number(flags: list[str], name: str) -> int | None:
    """The value of --name=value."""
    return next((int(flag.split("=")[1]) for flag in flags if flag.startswith(f"--{name}=")), None)


def main() -> None:
    torch.set_num_threads(1)
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    config = replace(SMALL, streams=2) if "--streams" in flags else SMALL
    pause = 0.05 if "--slow" in flags else 0.0
    try:
        with asked_to_stop() as should_stop, joined(number(flags, "shards"), "cpu") as place:
            reporting = Reporting(
                report_every=1, checkpoint_every=5, should_stop=should_stop,
                on_step=partial(pause_or_die, pause, number(flags, "die-at"), number(flags, "disk-full-at")),
            )  # fmt: skip
            model = tiny_llama(0).requires_grad_(False)
            train(model, tiny_tokenizer(), tokens_corpus(texts(), "texts"), config, folder, place=place,
                  reporting=reporting)  # fmt: skip
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(3)
    except TranscoderError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
