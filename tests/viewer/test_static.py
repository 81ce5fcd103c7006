"""What the browser gets: nothing foreign, nothing that makes markup of text."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import viewer

FOLDER = Path(viewer.__file__).parent
OWN_FILES = sorted(
    path for path in FOLDER.rglob("*") if path.suffix in {".js", ".css", ".html", ".svg"} and "vendor" not in path.parts
)


def test_the_vendored_file_is_the_one_of_the_manifest():
    vendor = FOLDER / "static" / "vendor"
    manifest = json.loads((vendor / "manifest.json").read_text("utf-8"))
    assert hashlib.sha256((vendor / manifest["file"]).read_bytes()).hexdigest() == manifest["sha256"]
    assert "Permission is hereby granted" in (vendor / "cytoscape.LICENSE").read_text("utf-8")


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.name)
def test_text_never_becomes_markup(path):
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\|\s*safe\b|autoescape false"
    assert not re.search(sinks, path.read_text("utf-8"))


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.name)
def test_nothing_is_fetched_from_elsewhere(path):
    names_of_namespaces = r"http://www\.w3\.org/(2000/svg)"
    text = re.sub(names_of_namespaces, "", path.read_text("utf-8"))
    assert not re.search(r"https?://|[\"'(]//", text)


@pytest.mark.parametrize("path", [path for path in OWN_FILES if path.suffix == ".html"], ids=lambda path: path.name)
def test_pages_have_no_inline_script_and_no_inline_style(path):
    text = path.read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:|<script(?![^>]*\ssrc=)", text)


def test_the_viewer_opens_without_what_takes_long_to_import():
    heavy = ("torch", "transformers", "tracer", "transcoders", "jaxtyping")
    code = f"import sys, viewer.serve; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER.parent)
    assert answer.stdout.strip() == "[]"
