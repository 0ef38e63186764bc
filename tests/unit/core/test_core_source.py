"""Rules of the house that the import linter cannot express, read off the source text."""

import ast
from pathlib import Path

import heterodox

ROOT = Path(heterodox.__file__).parent
SOURCES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}


def calls(source: str) -> set[str]:
    """Names of the functions that a module calls, `a.b.c()` as `a.b.c`."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}


def imported(source: str) -> set[str]:
    """Dotted names of everything that a module imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_source_was_found():
    assert {"cli/main.py", "core/comm.py", "cli/console.py"} <= SOURCES.keys()


def test_only_comm_touches_torch_distributed():
    def uses(source: str) -> bool:
        attributes = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
        return any(name.startswith("torch.distributed") for name in imported(source) | attributes)

    assert [name for name, source in SOURCES.items() if uses(source)] == ["core/comm.py"]


def test_only_the_command_line_and_the_console_print():
    printing = {name for name, source in SOURCES.items() if "print" in calls(source)}
    consoles = {name for name, source in SOURCES.items() if any("console.print" in call for call in calls(source))}
    writing = {name for name, source in SOURCES.items() if any(call.startswith("sys.std") for call in calls(source))}
    assert printing <= {"__main__.py", "cli/main.py", "cli/shared.py", "cli/console.py"}
    assert consoles <= {"cli/console.py"}
    assert writing <= {"__main__.py", "cli/main.py", "cli/shared.py"}


def test_nothing_is_pickled():
    for name, source in SOURCES.items():
        assert not {"torch.save", "torch.load", "pickle.dump", "pickle.load"} & calls(source), name
