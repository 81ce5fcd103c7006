"""The documentation is what the code says."""

import re
from pathlib import Path

import pytest

from docs.generate import pages
from tracer.cli import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_generated_pages_are_up_to_date(path):
    assert path.read_text(encoding="utf-8") == pages()[path], "run python docs/generate.py"


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_has_help_with_an_example(name):
    assert "Example" in (cli.commands[name].help or "")


def test_links_between_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
