"""Pages of the site that are generated: the first page and the guide for contributors from the files of the repository,
the tables of all committed results, and docstrings as Markdown.

A hook of mkdocs and an extension of griffe (`make docs`).
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from report import from_json, markdown

ROOT = Path(__file__).resolve().parents[1]


def of_repository(name: str) -> str:
    """A page at the top of the repository, with links as within docs."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\((?!docs/|https?:|#)([^)]+)\)", r"](../\1)", text).replace("](docs/", "](")


def results() -> str:
    """The tables of all committed results."""
    lines = ["# All results", "", "Each run of `make bench ARGS=--save-results` that is in `bench/results`.", ""]
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        run = from_json(path.read_text(encoding="utf-8"))
        table = re.sub(r"^\*\*(.*)\*\*$", r"### \1", markdown(run), flags=re.MULTILINE)
        lines += [f"## {run.device}, {run.date}", "", f"`{path.name}`", "", table, ""]
    return "\n".join(lines)


def on_files(files: Files, *, config: Any) -> Files:
    for name, content in (
        ("index.md", of_repository("README.md")),
        ("contributing.md", of_repository("CONTRIBUTING.md")),
        ("results.md", results()),
    ):
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside of docs become their paths in the repository."""
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", r"\1 (`\2`)", markdown)


# ---- docstrings

SECTION = re.compile(r"^([A-Z][\w -]*):(?: (.*))?$")
ITEM = re.compile(r"^ {4}([\w*][\w*,. ]*?)( \[.*?\])?: (.*)$")


def as_markdown(docstring: str) -> str:
    """A docstring of the house as Markdown: a section is a bold word, its indented entries are a list."""
    first, *rest = inspect.cleandoc(docstring).splitlines() or [""]
    lines, within = [first], False
    for line in rest:
        section, item = SECTION.match(line), ITEM.match(line)
        if section:
            within = True
            lines += ["", f"**{section[1]}**" + (f": {section[2]}" if section[2] else "\n")]
        elif within and item:
            lines.append(f"- `{item[1]}`{item[2] or ''}: {item[3]}")
        elif within and line.startswith(" "):
            lines.append("  " + line.strip() if lines[-1].startswith(("- ", "  ")) else line.strip())
        else:
            within = within and not line
            lines.append(line)
    return "\n".join(lines)


def documentation(obj: griffe.Object) -> str | None:
    """The docstring of a function or class, which some modules complete when they are imported."""
    written = None if obj.docstring is None else obj.docstring.value
    try:
        found: Any = importlib.import_module(obj.module.path)
    except ImportError:  # an integration whose package is not installed
        return written
    for name in obj.path.removeprefix(obj.module.path).split(".")[1:]:
        found = getattr(found, name, None)
    return found.__doc__ if isinstance(found, (type, types.FunctionType)) else written


class HouseStyle(griffe.Extension):
    """Converts docstrings before they are rendered."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.is_alias:
            return
        of_module = obj.docstring.value if obj.docstring is not None else None
        text = documentation(obj) if obj.is_function or obj.is_class else of_module
        if text:
            obj.docstring = griffe.Docstring(as_markdown(text), parent=obj)
