"""The README is true: its file tree and settings table come from the code, its commands exist.

`python -m tests.test_readme` writes both parts anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from service.cli import app
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def first_words(path: Path) -> str:
    """The start of a module's docstring, or of a C file's first comment, up to its first full stop or colon."""
    source = path.read_text()
    docstring = source.split("/*", 1)[1] if path.suffix in (".c", ".h") else ast.get_docstring(ast.parse(source)) or ""
    return re.split(r"(?<=[.:;])\s|\n\n", " ".join(docstring.split()))[0].rstrip(".:;")


def tree_lines(folder: Path, depth: int) -> Iterator[str]:
    """Every source file below a folder with what it holds."""
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.is_dir() and path.name not in ("__pycache__", "versions"):
            about = first_words(path / "__init__.py") if (path / "__init__.py").exists() else ""
            yield f"{'  ' * depth + path.name + '/':<30}{about}".rstrip()
            yield from tree_lines(path, depth + 1)
        elif path.suffix in (".c", ".h", ".py") and path.name != "__init__.py":
            yield f"{'  ' * depth + path.name:<30}{first_words(path)}"


def file_tree() -> str:
    """The annotated tree of the packages."""
    lines = ["```text"]
    for package in ("service", "training"):
        lines.append(f"{package + '/':<30}{first_words(ROOT / package / '__init__.py')}")
        lines += tree_lines(ROOT / package, 1)
    return "\n".join([*lines, "```"])


def settings_table() -> str:
    """One row per setting."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default if field.default not in ("", None) else "–"
        rows.append(f"| `TUNESMITH_{name.upper()}` | `{default}` | {field.description} |")
    return "\n".join(rows)


GENERATED = {"tree": file_tree, "settings": settings_table}


def part(name: str, text: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    assert found, f"README.md has no part {name}"
    return found[1]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_equal_the_code(name: str) -> None:
    assert part(name, README.read_text()) == GENERATED[name](), "run `python -m tests.test_readme`"


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", README.read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^(?:\.venv/bin/)?tunesmith ([a-z]+)", README.read_text(), re.MULTILINE):
        assert line in commands, line


def test_the_python_snippet_is_valid() -> None:
    for snippet in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        ast.parse(snippet)


def test_every_link_to_a_file_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


if __name__ == "__main__":
    content = README.read_text()
    for key, make in GENERATED.items():
        start, end = f"<!-- {key} -->\n", f"\n<!-- /{key} -->"
        head, rest = content.split(start)
        content = head + start + make() + end + rest.split(end)[1]
    README.write_text(content)
