"""A loaded model that traces rows into a store."""

import os
from dataclasses import replace

from graphs import GraphError, GraphStore, graph_id_of
from tracer.attribution import question
from tracer.batch import Job, Outcome, Status
from tracer.errors import TraceError
from tracer.loading import Loaded, load, save_features, share_threads
from tracer.memory import SAVE_LESS, explaining_lack_of_memory
from tracer.pipeline import config_text, trace
from tracer.prompts import Row
from transcoders.errors import TranscoderError

EXPECTED = (TraceError, TranscoderError, GraphError)
"""What a prompt, a model or a disk may be to blame for; anything else is a bug."""


class Worker:
    """One loaded model, the job and its store."""

    def __init__(self, job: Job, loaded: Loaded) -> None:
        self.job, self.loaded, self.store = job, loaded, GraphStore(job.store)
        save_features(self.store, loaded)

    def trace(self, row: Row) -> Outcome:
        """Trace the row and save its graph, unless the store has it."""
        try:
            status, doubt = self._trace(row)
            return Outcome(row, status, process=os.getpid(), doubt=doubt)
        except EXPECTED as error:
            return Outcome(row, Status.FAILED, str(error), os.getpid())

    def _trace(self, row: Row) -> tuple[Status, str]:
        if row.problem:
            raise TraceError(row.problem)
        self.loaded.check(row.prompt)
        replacement = self.loaded.replacement
        asked = question(replacement.tokenize(row.prompt), replacement.origin, replacement.transcoder.config.n_layers)
        graph_id = graph_id_of(replace(asked, config=config_text(self.job.config)))
        found = self.store.find(graph_id)
        if found is None:
            done = trace(row.prompt, replacement, self.job.config, labels=self.loaded.labels, tags=row.tags)
            with explaining_lack_of_memory(SAVE_LESS):
                self.store.save(done.graph)
            return Status.TRACED, done.doubt
        if row.tags and row.tags != found.info.tags:  # the file says something new about an old prompt
            graph = self.store.load(graph_id)
            self.store.save(replace(graph, info=replace(graph.info, tags=row.tags)))
        return Status.FOUND, ""


def begin(job: Job, device: str, share: int) -> Worker:
    """Load the model onto the device; the processor is divided by `share`, the workers that compute on it."""
    loaded = load(replace(job.source, device=device))
    share_threads(loaded, share)
    return Worker(job, loaded)
