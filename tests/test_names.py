"""Every name that is used is defined somewhere in its file: linters cannot tell, since shapes are strings of names."""

import ast
import builtins
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("graphs", "transcoders", "tracer", "viewer", "examples", "benchmarks", "tests")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
ALWAYS = {*dir(builtins), "__file__", "__name__"}


def defined(node):
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Import():
            return [(name.asname or name.name).split(".")[0] for name in node.names]
        case ast.ImportFrom():
            return [name.asname or name.name for name in node.names]
        case ast.Name(ctx=ast.Store()):
            return [node.id]
        case ast.arg():
            return [node.arg]
        case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
            return [node.name]
    return []


def test_every_name_is_defined():
    unknown = []
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        known = ALWAYS | {name for node in nodes for name in defined(node)}
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        unknown += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(used - known)]
    assert unknown == []
