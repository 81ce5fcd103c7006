"""Many prompts into one store: the command, going on after an interruption, failures, workers that are killed."""

import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from multiprocessing import active_children
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from graphs import GraphStore
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tests.tracer.processes import ENVIRONMENT, TRACE, refused, run
from tests.waiting import ended, wait_until
from tracer import batch_command
from tracer.batch import Job, Status
from tracer.batch_command import progress_line
from tracer.config import TraceConfig
from tracer.errors import TraceError
from tracer.loading import Source
from tracer.processes import trace_in_processes
from tracer.prompts import Row
from tracer.worker import Worker, begin
from transcoders import save

PROMPTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(20)]
ROWS = [Row(number, prompt) for number, prompt in enumerate(PROMPTS, 1)]


def write_tiny_model(folder: Path) -> Source:
    tiny_llama(0).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save(tiny_transcoder(1), folder / "transcoder")
    return Source(str(folder / "model"), str(folder / "transcoder"), device="cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A tiny model and a tiny transcoder, in folders."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def worker(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return begin(Job(tmp_path_factory.mktemp("traced") / "store", source, TraceConfig()), "cpu", share=1)


def batch_arguments(source: Source, *arguments: str) -> list[str]:
    return [
        "batch",
        *arguments,
        "--model",
        str(source.model),
        "--transcoder",
        str(source.transcoder),
        "--device",
        "cpu",
    ]


def leftovers(folder: Path) -> list[Path]:
    """What interrupted writes would leave."""
    return [path for path in folder.rglob(".*")]


def prompts_in(store: Path) -> list[str]:
    return sorted(stored.info.prompt for stored in GraphStore(store).list())


@pytest.mark.slow
def test_a_file_becomes_a_store_that_answers_by_tag(source, tmp_path):
    rows = [
        {"prompt": "w1 w2 w3", "group": "a"}, {"prompt": "w1 w2 w4", "group": "b", "n": 7},
        {"prompt": "", "group": "c"}, {"prompt": "w1 w2 w3", "group": "again"}, {"prompt": "w1 " * 40, "group": "d"},
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = run(*batch_arguments(source, "prompts.jsonl", "--json", "--store", "s"), folder=tmp_path)
    assert result.returncode == 1, result.stderr
    summary = json.loads(result.stdout)
    assert summary["doubt"].startswith("the transcoder explains nothing of what most MLPs of ")  # it is random
    assert summary | {"seconds": 0, "doubt": ""} == {
        "store": "s", "prompts": 4, "traced": 2, "found": 0, "failed": 2, "duplicates": 1, "seconds": 0,
        "doubtful": 2, "doubt": "", "failures": str(tmp_path / "s.failed.jsonl"),
    }  # fmt: skip
    failed = [json.loads(line) for line in (tmp_path / "s.failed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted((one["row"], one["tags"]["group"]) for one in failed) == [(3, "c"), (5, "d")]
    assert {one["error"].split(";")[0] for one in failed} == {
        "the prompt is empty", "the prompt has 41 tokens, the model reads at most 32"
    }  # fmt: skip
    query = "SELECT tags['group'] AS tag, tags['n'] AS n, count(*) AS graphs FROM graphs GROUP BY ALL ORDER BY 1"
    answer = GraphStore(tmp_path / "s").sql(query).to_pylist()
    assert answer == [{"tag": "a", "n": None, "graphs": 1}, {"tag": "b", "n": "7", "graphs": 1}]
    listed = run("sql", "s", "SELECT tags FROM graphs WHERE tags['n'] = '7'", "--format", "json", folder=tmp_path)
    assert json.loads(listed.stdout) == [{"tags": {"group": "b", "n": "7"}}]


def test_a_graph_of_a_batch_is_the_graph_of_its_prompt_alone(worker):
    assert worker.trace(Row(1, "w5 w6 w7")).status == Status.TRACED
    [graph_id] = [stored.graph_id for stored in worker.store.list() if stored.info.prompt == "w5 w6 w7"]
    from tracer.pipeline import trace

    alone = trace("w5 w6 w7", worker.loaded.replacement).graph
    saved = worker.store.load(graph_id)
    info = replace(
        saved.info, created_at=alone.info.created_at, seconds=alone.info.seconds,
        peak_memory_mb=alone.info.peak_memory_mb,
    )  # fmt: skip
    assert replace(saved, info=info) == alone


def test_what_is_in_the_store_is_not_traced_again(worker):
    assert worker.trace(Row(1, "w8 w9")).status == Status.TRACED
    [before] = [stored for stored in worker.store.list() if stored.info.prompt == "w8 w9"]
    assert worker.trace(Row(1, "w8 w9")).status == Status.FOUND
    assert worker.store.find(before.graph_id) == before


def test_what_is_in_a_pack_is_not_traced_again_and_gets_new_tags(worker, source, tmp_path):
    other = Worker(replace(worker.job, store=tmp_path / "store"), worker.loaded)
    assert other.trace(Row(1, "w8 w7")).status == Status.TRACED
    [before] = other.store.list()
    other.store.compact()
    assert other.trace(Row(1, "w8 w7")).status == Status.FOUND
    assert not any((other.store.folder / "graphs").iterdir())
    assert other.trace(Row(1, "w8 w7", (("group", "a"),))).status == Status.FOUND
    [after] = other.store.list()
    assert (after.graph_id, after.info) == (before.graph_id, replace(before.info, tags=(("group", "a"),)))


def test_other_settings_are_another_graph(worker):
    other = Worker(replace(worker.job, config=TraceConfig(node_threshold=0.5)), worker.loaded)
    assert worker.trace(Row(1, "w10 w9")).status == Status.TRACED
    assert other.trace(Row(1, "w10 w9")).status == Status.TRACED
    assert prompts_in(worker.job.store).count("w10 w9") == 2


def test_new_tags_are_put_on_a_graph_that_is_there(worker):
    def tags():
        return [stored.info.tags for stored in worker.store.list() if stored.info.prompt == "w11 w9"]

    worker.trace(Row(1, "w11 w9"))
    assert tags() == [()]
    assert worker.trace(Row(1, "w11 w9", (("group", "a"),))).status == Status.FOUND
    assert tags() == [(("group", "a"),)]
    worker.trace(Row(1, "w11 w9"))  # a file without tags says nothing about them
    assert tags() == [(("group", "a"),)]


def test_a_damaged_graph_is_traced_again(worker):
    worker.trace(Row(1, "w12 w9"))
    [stored] = [stored for stored in worker.store.list() if stored.info.prompt == "w12 w9"]
    (worker.store.folder / "graphs" / stored.graph_id / "graph.parquet").write_bytes(b"torn")
    assert worker.trace(Row(1, "w12 w9")).status == Status.TRACED
    assert worker.store.find(stored.graph_id) is not None


@pytest.mark.slow
def test_the_header_of_a_csv_is_no_prompt(source, tmp_path):
    (tmp_path / "prompts.csv").write_text("group,prompt\na,w1 w2\nb,w3 w4\n,w5 w6\n")
    result = run(*batch_arguments(source, "prompts.csv", "--json", "--store", "s"), folder=tmp_path)
    assert (json.loads(result.stdout)["traced"], result.returncode) == (3, 0)
    answer = GraphStore(tmp_path / "s").sql("SELECT prompt, tags['group'] AS tag FROM graphs ORDER BY 1").to_pylist()
    assert [tuple(row.values()) for row in answer] == [("w1 w2", "a"), ("w3 w4", "b"), ("w5 w6", None)]


@pytest.mark.parametrize(
    ("done", "seconds", "line"),
    [
        (10, 60.0, "trace: 10 of 40 prompts, 2 failed, 3 minutes left"),
        (1, 600.0, "trace: 1 of 40 prompts, 2 failed, 390 minutes left"),
        (40, 60.0, "trace: 40 of 40 prompts, 2 failed, 0 minutes left"),
    ],
)
def test_the_time_that_is_left_follows_from_what_is_done(done, seconds, line):
    assert progress_line(done, 40, 2, seconds) == line


@pytest.mark.slow
def test_where_stderr_is_no_terminal_a_batch_tells_in_lines_how_far_it_is(source, tmp_path, command, monkeypatch):
    monkeypatch.setattr(batch_command, "SECONDS_BETWEEN_LINES", 0.0)
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw3 w4\n" + "w1 " * 50)
    code, _, errors = command(*batch_arguments(source, "prompts.txt"))
    assert code == 1
    first, second, third = errors.splitlines()  # the longest first
    assert re.fullmatch(r"trace: 1 of 3 prompts, 1 failed, \d+ minutes left", first)
    assert re.fullmatch(r"trace: 2 of 3 prompts, 1 failed, \d+ minutes left", second)
    assert third == "trace: 3 of 3 prompts, 1 failed, 0 minutes left"


@pytest.mark.parametrize("prompt", ["", " ", "\ud800", "w1 " * 50])
def test_a_prompt_that_cannot_be_traced_fails_in_one_line(worker, prompt):
    outcome = worker.trace(Row(7, prompt))
    assert outcome.status == Status.FAILED
    assert outcome.row.number == 7
    assert len(outcome.error) > 20
    assert "\n" not in outcome.error


def test_a_row_whose_prompt_is_no_text_fails_with_that_reason(worker):
    assert worker.trace(Row(7, "", problem="the prompt is no text")).error == "the prompt is no text"


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_doubles_nothing(source, tmp_path):
    job = Job(tmp_path / "store", source, TraceConfig())
    outcomes, killed = [], None
    for outcome in trace_in_processes(job, ROWS, ["cpu", "cpu"]):
        outcomes.append(outcome)
        if killed is None and len(outcomes) == 4:
            killed = outcome.process
            os.kill(killed, signal.SIGKILL)
    assert sorted(outcome.row.number for outcome in outcomes) == list(range(1, 21))
    assert {outcome.status for outcome in outcomes} <= {Status.TRACED, Status.FOUND}
    assert prompts_in(job.store) == sorted(PROMPTS)
    assert GraphStore(job.store).damaged() == []
    # the one that was killed may have answered once more before it was
    assert sum(outcome.process == killed for outcome in outcomes[5:]) == 0
    assert active_children() == []


def test_workers_that_die_before_they_begin_end_the_batch(source, tmp_path, monkeypatch):
    start = SpawnProcess.start

    def start_and_kill(process):
        start(process)
        process.kill()

    monkeypatch.setattr(SpawnProcess, "start", start_and_kill)
    with pytest.raises(TraceError, match="3 workers were killed by signal 9 while they loaded the model"):
        list(trace_in_processes(Job(tmp_path / "store", source, TraceConfig()), ROWS, ["cpu"]))


@pytest.mark.slow
def test_an_interrupted_batch_keeps_what_is_done_and_goes_on_from_there(source, tmp_path):
    interrupt_and_go_on(source, tmp_path)


def interrupt_and_go_on(source, tmp_path, *engine):
    """Ctrl-C in the middle of a batch, and the same command again."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"w{i} w{k} w{i}" for i in range(40) for k in range(12)))
    arguments = batch_arguments(source, "prompts.txt", "--store", "s", "--json", *engine)
    process = subprocess.Popen(
        [*TRACE, *arguments], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: any((tmp_path / "s" / "graphs").glob("*/graph.parquet")), process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes
        output, errors = ended(process)
    finally:
        process.kill()
    assert (process.returncode, output) == (2, "")
    assert "same command goes on from there" in errors
    assert len(errors.splitlines()) == 1, errors
    assert leftovers(tmp_path / "s") == []
    done = len(prompts_in(tmp_path / "s"))
    assert 0 < done < 480
    assert GraphStore(tmp_path / "s").damaged() == []
    summary = json.loads(run(*arguments, folder=tmp_path).stdout)
    assert (summary["found"], summary["traced"], summary["failed"]) == (done, 480 - done, 0)
    assert len(prompts_in(tmp_path / "s")) == 480


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("prompts.txt", "--store", "other"), "other belongs to something else: it has no store.json"),
        (("empty.txt",), "empty.txt holds no prompts"),
        (("prompts.json",), "prompts.json is JSON, which is not read; give JSONL"),
        (("prompts.txt", "--column", "x"), "has no column 'x'; it has 'prompt'"),
        (("prompts.txt", "--model", "m"), "a transcoder of m is lacking; give --transcoder too"),
        (("prompts.txt", "--address", "auto"), "--address was given without --engine ray"),
        (("prompts.txt", "--workers", "0"), "0 is not in the range x>=1"),
        (("graphs-store.failed.jsonl",), "is where this batch lists its own failures"),
    ],
)
def test_a_batch_that_cannot_begin_is_refused_in_one_line(tmp_path, arguments, told):
    (tmp_path / "prompts.txt").write_text("calc: 1+1=\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "prompts.json").write_text('["calc: 1+1="]')
    (tmp_path / "graphs-store.failed.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert told in refused(run("batch", *arguments, folder=tmp_path))


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_batch_in_one_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("calc: 1+1=\n")
    asked = ("--model", str(tmp_path), "--transcoder", str(tmp_path), "--device", "cpu", "--workers", "2")
    (tmp_path / "graphs-store.failed.jsonl").write_text("of the run before\n")
    result = run("batch", "prompts.txt", *asked, folder=tmp_path)
    assert "is not a Hugging Face model directory" in refused(result)
    assert (tmp_path / "graphs-store.failed.jsonl").read_text() == "of the run before\n"
