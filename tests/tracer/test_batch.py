"""Many prompts into one store: reading files, resuming, failures, and workers that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import save_file

from graphs import GraphStore
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tracer.batch import Job, Status
from tracer.config import TraceConfig
from tracer.errors import TraceError
from tracer.loading import Source
from tracer.processes import trace_in_processes
from tracer.prompts import Row, distinct, read_prompts

TRACE = [sys.executable, "-c", "from tracer.cli import main; main()"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PROMPTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(12)]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A tiny model and a tiny transcoder in folders."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(0).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save(tiny_transcoder(1), folder / "transcoder")
    return Source(str(folder / "model"), str(folder / "transcoder"), device="cpu")


def batch(named, *arguments, folder):
    command = [*TRACE, "batch", *arguments, "--model", named.model, "--transcoder", named.transcoder, "--device", "cpu"]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False
    )
