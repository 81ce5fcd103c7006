"""The lab as it ships."""

import pytest

from examples.lab import measure
from examples.lab.world import questions, read_world
from tracer import lab as bundled


@pytest.fixture(scope="module")
def lab() -> measure.Lab:
    """The world, its questions, and the language model."""
    world = read_world()
    return measure.Lab(world, questions(world), *measure.load_model(str(bundled.folder() / "model")))
