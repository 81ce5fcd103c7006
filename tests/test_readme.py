"""What the README shows is what happens."""

import re
import shlex
from pathlib import Path

import pytest

from graphs import GraphStore
from tests.tracer.processes import run
from tracer.lab import folder

README = Path(__file__).parents[1] / "README.md"
MEASURED = re.compile(r"\d+e-\d+|\(\d+\.\d+ s\)")
"""What differs from machine to machine: rounding errors and times."""


def shown(name: str) -> str:
    """What stands in the block below a comment."""
    [text] = re.findall(rf"<!-- {name} -->\n```\w+\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return text


def examples(name: str) -> list[tuple[list[str], str]]:
    """Commands and what is shown below each."""
    parts = re.split(r"^\$ trace ", shown(name), flags=re.MULTILINE)[1:]
    found = (re.match(r'((?:[^"\n]|"[^"]*")*)\n(.*)', part, re.DOTALL) for part in parts)
    return [(shlex.split(match[1]), match[2].strip()) for match in found if match]


def test_all_examples_are_found():
    assert [len(examples(name)) for name in ("more examples", "sql example")] == [5, 2]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder with the graphs that the README's queries are about."""
    path = tmp_path_factory.mktemp("readme")
    for relation in ("capital", "bird", "flower"):
        assert run(f"the {relation} of the state containing Dallas is", folder=path).returncode == 0
    return path


def test_the_install_command_prints_what_is_shown(tmp_path):
    [prompt] = re.findall(r'bin/trace "(.*)"', shown("install command"))
    result = run(prompt, folder=tmp_path)
    assert MEASURED.sub("…", result.stdout) == MEASURED.sub("…", shown("output of the install command"))


@pytest.mark.parametrize(("arguments", "expected"), examples("more examples"))
def test_every_prompt_has_the_answer_and_the_route_that_are_shown(tmp_path, arguments, expected):
    lines = [line.strip() for line in run(*arguments, folder=tmp_path).stdout.splitlines()]
    route = lines[next(i for i, line in enumerate(lines) if line.startswith("Circuit")) + 1]
    assert [next(line for line in lines if line.startswith("Answer")), route] == expected.splitlines()


@pytest.mark.parametrize(("arguments", "expected"), examples("sql example"))
def test_every_query_has_the_answer_that_is_shown(store, arguments, expected):
    assert run(*arguments, folder=store).stdout.strip() == expected


def test_the_python_example_traces_and_saves(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my-model").symlink_to(folder() / "model")
    (tmp_path / "my-transcoder").symlink_to(folder() / "transcoder")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    assert [stored.info.prompt for stored in GraphStore("graphs-store").list()] == ["the capital of France is"]
