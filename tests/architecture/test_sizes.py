"""Budgets of size: long functions and files are two things in one."""

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("app", "core", "stillhouse", "worker")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 80
MAX_ARGUMENTS = 7
MAX_MEDIAN_LINES = 10


def _functions() -> list[tuple[int, int, str]]:
    """Lists (lines, arguments, name) of every function in the rooms; a docstring does not count."""
    found = []
    for path in (p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                lines = (node.end_lineno or 0) - first.lineno + 1
                names = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
                count = len([name for name in names if name not in {"self", "cls"}])
                found.append((lines, count, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return sorted(found, reverse=True)


def test_functions_are_short() -> None:
    functions = _functions()
    largest = "\n".join(f"{lines:3} lines {name}" for lines, _, name in functions[:10])
    print(largest)  # noqa: T201 - a look at what grows
    too_long = [
        (lines, name)
        for lines, _, name in functions
        if lines > (MAX_KERNEL_LINES if "worker/kernels" in name else MAX_FUNCTION_LINES)
    ]
    assert not too_long
    assert statistics.median(lines for lines, _, _ in functions) <= MAX_MEDIAN_LINES


def test_functions_take_few_arguments() -> None:
    """Endpoints and commands are exempt: each of their arguments is a parameter that a user names."""
    exempt = ("endpoints.py", "stillhouse/cli.py", "stillhouse/commands/")
    many = [name for _, count, name in _functions() if count > MAX_ARGUMENTS and not any(e in name for e in exempt)]
    assert not many


def test_files_are_short() -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    assert not {name: size for name, size in sizes.items() if size > MAX_FILE_LINES}


def test_names_say_what_a_module_holds() -> None:
    vague = {"utils.py", "helpers.py", "common.py", "base.py", "misc.py"}
    assert not [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.name in vague]
