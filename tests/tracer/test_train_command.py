"""`trace train` in its own process: a run, its metrics, a run that goes on, and what it refuses."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from dataclasses import fields

import click
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tracer.processes import ENVIRONMENT, TRACE, run
from tests.waiting import ended, wait_until
from tracer.cli import cli
from tracer.errors import TraceError
from tracer.train_command import _line
from transcoders import TrainConfig, TranscoderError
from transcoders.progress import latest

STATES = ("Texas", "Ohio", "Utah", "Iowa", "Nevada", "Oregon", "Idaho", "Maine")
SMALL = ("--n-features", "64", "--k", "4", "--batch-tokens", "256", "--buffer-tokens", "1024", "--context", "16")
SHORT = ("train", "--data", "data.txt", "--out", "run", *SMALL, "--tokens", "15_360", "--report-every", "10")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("".join(f"the capital of {a} is {b} .\n" for a in STATES for b in STATES))
    return path


@pytest.mark.slow
def test_a_transcoder_is_trained_and_traced_with(tmp_path, data):
    done = run("train", "--data", str(data), "--out", "run", *SMALL, "--tokens", "20_480", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run/transcoder is ready; trace with --transcoder run/transcoder\n"
    assert "step 80/80" in done.stderr and "NMSE" in done.stderr
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    assert [row["step"] for row in rows] == [20, 40, 60, 80]
    assert rows[-1]["nmse"] < rows[0]["nmse"]
    assert len(rows[-1]["nmse_by_layer"]) == 6 and len(rows[-1]["relative_error_by_position"]) == 4
    traced = run("the capital of Texas is", "--transcoder", "run/transcoder", folder=tmp_path)
    assert traced.returncode == 0, traced.stderr
    assert "Answer" in traced.stdout and "active features" in traced.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_a_checkpoint_and_the_same_command_goes_on(tmp_path, data, asked, status):
    arguments = ("train", "--data", str(data), "--out", "run", *SMALL, "--tokens", "1_024_000", "--report-every", "5")
    process = subprocess.Popen([*TRACE, *arguments], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / "run" / "metrics.parquet").exists(), process)
    process.send_signal(asked)
    _, error = ended(process)
    assert process.returncode == status, error
    step = latest(tmp_path / "run").name.removeprefix("step-")
    assert f"trace: stopped after step {step} of 4000; start the same command again to go on." in error
    changed = run(*arguments, "--k", "5", folder=tmp_path)
    assert changed.returncode == 2
    assert "holds a run with other settings: k was 4 and is 5." in changed.stderr
    assert len(changed.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "missing.txt"), "is no file here|is neither a file here nor a data set"),
        (("--data", "data.txt", "--k", "0"), "k is 0; expected 1 or more"),
        (("--data", "data.txt", "--k", "99", "--n-features", "64"), "k is 99 of 64 features"),
        (("--data", "data.txt", "--tokens", "10"), "10 tokens do not fill one step"),
        (("--data", "data.txt", "--model", "data.txt"), "is not a Hugging Face model directory"),
        (("--data", "data.txt", "--shards", "2"), "start them with torchrun"),
        (("--data", "data.txt", "--context", "49"), "context is 49, the model reads 48 tokens at most"),
        (("--data", "data.txt", "--context", "1"), "context is 1; expected 2 tokens or more"),
        (("--data", "data.txt", "--learning-rate", "-1"), "learning_rate is -1.0; expected a number above 0"),
        (("--data", "data.txt", "--report-every", "0"), "--report-every is 0; expected 1 step or more"),
        (("--data", "data.txt", "--checkpoint-every", "0"), "--checkpoint-every is 0; expected 1 step or more"),
    ],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(tmp_path, data, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TranscoderError, TraceError), match=message):
        cli.main(["train", "--out", "run", *arguments], standalone_mode=False)
    assert not (tmp_path / "run").exists()


def test_the_options_have_the_defaults_of_the_configuration():
    options = {option.name: option for option in cli.commands["train"].params}
    known = {field.name: field.default for field in fields(TrainConfig)}
    shared = options.keys() & known.keys()
    assert len(shared) == 18
    shared -= {"context"}  # which the model may limit
    assert {name: options[name].default for name in shared} == {name: known[name] for name in shared}


@pytest.mark.slow
def test_a_sequence_is_by_default_as_long_as_the_model_reads_at_most(tmp_path, data):
    few = ("--n-features", "64", "--k", "4", "--batch-tokens", "256", "--buffer-tokens", "1024", "--tokens", "256")
    done = run("train", "--data", str(data), "--out", "run", *few, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["context"] == 48


def shown_on_terminal(folder, columns):
    """All that the command wrote to a terminal of this width, line by line without colours."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [*TRACE, *SHORT], cwd=folder, env=environment | {"TERM": "xterm"}, stdout=subprocess.DEVNULL,
        stderr=follower,
    )  # fmt: skip
    os.close(follower)
    written = b""
    while part := read(leader):
        written += part
    os.close(leader)
    assert process.wait() == 0, written
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


def read(leader):
    """What comes next, or nothing: a terminal that nobody writes to any more gives an error."""
    try:
        return os.read(leader, 4096)
    except OSError:
        return b""


@pytest.mark.slow
def test_the_live_line_tells_speed_loss_error_sparsity_and_the_time_left_within_eighty_columns(tmp_path, data):
    lines = shown_on_terminal(tmp_path, columns=80)
    reported = [line for line in lines if "tokens/s" in line]
    assert len(reported) >= 3
    wanted = r"\d+ % \d:\d\d:\d\d [\d,]+ tokens/s  loss \d\.\d{4}  NMSE \d\.\d{4}  L0 \d+\.\d  dead \d+\.\d%\s*$"
    assert [line for line in reported if not re.search(wanted, line)] == []
    assert "100 % 0:00:00" in lines[-1]
    last = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()[-1]
    assert lines[-1].rstrip().endswith(_line(last))


@pytest.mark.slow
def test_tensorboard_reads_the_metrics_that_were_written_for_it(tmp_path, data):
    done = run(*SHORT, "--tensorboard", "board", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    for name in ("loss", "nmse", "l0", "dead", "tokens_per_second", "learning_rate"):
        read = [(event.step, event.value) for event in board.Scalars(name)]
        assert read == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows], name


def test_without_tensorboard_it_is_said_what_to_install_before_anything_is_trained(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as Python notes what cannot be imported
    with pytest.raises(click.ClickException, match="--tensorboard needs another package: pip install tensorboard"):
        cli.main([*SHORT, "--tensorboard", "board"], standalone_mode=False)
    assert not (tmp_path / "run").exists()
