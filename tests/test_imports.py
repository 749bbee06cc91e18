"""No circle of files: a file can be read after those that it imports."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.support import ROOT


def modules() -> dict[str, Path]:
    """Every file of the package by its module name. Links are followed."""
    found = {}
    for folder in ("", "kernels", "tools"):
        for path in (ROOT / "megaconsa" / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported_by(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, at its head or inside a function.

    Imports of a package's own `__init__` do not count: it only re-exports names.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module} & known
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
    return found


def test_no_circle_of_files() -> None:
    files = modules()
    assert "megaconsa.kernels.attention.reference" in files
    graph = {name: imported_by(path, set(files)) - {name} for name, path in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {error.args[1]}") from None
