"""Trains a tiny transcoder, alone or under torchrun; run by test_train.py and test_parallel.py, not by pytest."""

import os
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


def pause_or_die(pause: float, dies_at: int | None, step: int, steps: int) -> None:
    """Give others time to interfere; the last of several processes is killed at one step."""
    time.sleep(pause)
    if step == dies_at and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    shards = next((int(flag.removeprefix("--shards=")) for flag in flags if flag.startswith("--shards=")), None)
    config = replace(SMALL, streams=2) if "--streams" in flags else SMALL
    pause = 0.05 if "--slow" in flags else 0.0
    dies_at = next((int(flag.removeprefix("--die-at=")) for flag in flags if flag.startswith("--die-at=")), None)
    try:
        with asked_to_stop() as should_stop, joined(shards, "cpu") as place:
            reporting = Reporting(
                report_every=1, checkpoint_every=5, should_stop=should_stop,
                on_step=partial(pause_or_die, pause, dies_at),
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
