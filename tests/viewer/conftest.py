"""An empty store for the tests of the viewer."""

from pathlib import Path

import pytest

from graphs import GraphStore


@pytest.fixture
def store(tmp_path: Path) -> GraphStore:
    return GraphStore(tmp_path / "store")
