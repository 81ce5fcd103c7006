"""The views and macros of a store: the SQL files beside this module, and what their comments say."""

import re
from importlib.resources import files

import pyarrow as pa

from graphs.schema import tables


def views() -> dict[str, str]:
    """The SQL of every view by name; its columns are those of table `nodes`."""
    return {name: sql for name, sql in _statements().items() if f"CREATE VIEW {name}" in sql}


def macros() -> dict[str, str]:
    """The SQL of every macro by name, in an order to create them; the leading comment says what it is for."""
    found = {name: sql for name, sql in _statements().items() if f"CREATE MACRO {name}" in sql}

    def depth(name: str) -> int:
        used = [other for other in found if other != name and re.search(rf"\b{other}\(", _code(found[name]))]
        return 1 + max(map(depth, used), default=0)

    return {name: found[name] for name in sorted(found, key=lambda name: (depth(name), name))}


def is_table_macro(sql: str) -> bool:
    """Whether the macro gives rows; others give a value."""
    return " AS TABLE\n" in sql


def macro_description(sql: str) -> str:
    """The comment at the head of a file of SQL, as one line, without the example."""
    return " ".join(line for line in _comment(sql) if not line.startswith("Example: "))


def macro_example(sql: str) -> str:
    """A query that shows the macro or view in use; `$graph` and the like stand for ids and numbers of nodes."""
    [example] = [line for line in _comment(sql) if line.startswith("Example: ")]
    return example.removeprefix("Example: ")


def macro_signature(name: str, sql: str) -> str:
    """The macro's name and parameters, as `inputs_of(graph, of_node)`."""
    parameters = re.search(rf"CREATE MACRO {name}\(([^)]*)\)", sql)
    assert parameters, f"graphs/sql/{name}.sql creates a macro {name}"
    return f"{name}({parameters.group(1)})"


def view_columns(name: str) -> list[pa.Field]:
    """The columns of a view."""
    selected = re.search(r"\nSELECT ([^;]*)\nFROM nodes\n", views()[name])
    assert selected, f"graphs/sql/{name}.sql selects columns of nodes"
    return [tables()["nodes"].field(column.strip()) for column in selected.group(1).split(",")]


def _statements() -> dict[str, str]:
    folder = files("graphs") / "sql"
    found = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    return {file.name.removesuffix(".sql"): file.read_text("utf-8") for file in found}


def _comment(sql: str) -> list[str]:
    comment = re.match(r"(?:--[^\n]*\n)+", sql)
    assert comment, "every file in graphs/sql starts with a comment"
    return [line.removeprefix("--").strip() for line in comment.group().splitlines()]


def _code(sql: str) -> str:
    return re.sub(r"--[^\n]*", "", sql)
