"""Processes forked from one that has loaded what they need: each of a hundred would load torch anew."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "tracer.cli", "tracer.pipeline", "tests.graphs.storm"]
)
