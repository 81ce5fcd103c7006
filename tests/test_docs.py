"""The documentation is what the code says."""

import re
from pathlib import Path

import pytest

from docs.generate import pages, schema_markdown
from graphs.schema import tables
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


def test_the_table_of_modules_names_each_that_is_there_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = ("transcoders", "tracer", "graphs", "viewer")
    named = set()
    for cell in re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        of_first = first.split("/")[0]  # which the others leave out, unless they are of another package
        named |= {first, *(name if name.split("/")[0] in packages else f"{of_first}/{name}" for name in others)}
    found = {name: list(ROOT.glob(name)) for name in named}
    assert [name for name, paths in found.items() if not paths] == []
    inside = {path for paths in found.values() for one in paths for path in (one, *one.rglob("*.py"))}
    modules = {path for package in packages for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"}
    assert sorted(str(path.relative_to(ROOT)) for path in modules - inside) == []


def test_the_page_of_documentation_names_every_table_column_and_macro():
    page = schema_markdown()
    for name, table in tables().items():
        assert f"\n## {name}\n" in page
        assert all(f"| `{column}` |" in page for column in table.names)
    assert "### `strongest_path(from_word)`\n\nIn every graph of a prompt with this word" in page
    assert "| `tokens` | `list<string>` |  | Text of each token of the prompt. |" in page
