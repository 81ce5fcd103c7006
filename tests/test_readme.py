"""What the README shows is what happens."""

import re
from pathlib import Path

from graphs import GraphStore
from tracer.lab import folder

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_traces_and_saves(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my-model").symlink_to(folder() / "model")
    (tmp_path / "my-transcoder").symlink_to(folder() / "transcoder")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    assert [stored.info.prompt for stored in GraphStore("graphs-store").list()] == ["the capital of France is"]
