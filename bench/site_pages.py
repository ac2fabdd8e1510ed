"""Pages of the site that are generated: the first page and the guide for contributors from the files of the repository,
the tables of all committed results, and docstrings as Markdown.

A hook of mkdocs and an extension of griffe (`make docs`).
"""

from __future__ import annotations

import inspect
import re
import sys
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
    lines: list[str] = []
    within = False
    for line in inspect.cleandoc(docstring).splitlines():
        section, item = SECTION.match(line), ITEM.match(line)
        if section and not line.startswith(" "):
            within = True
            lines += ["", f"**{section[1]}**{': ' + section[2] if section[2] else ''}", ""]
        elif within and item:
            lines += [f"- `{item[1]}`{item[2] or ''}: {item[3]}"]
        elif within and line.startswith(" "):
            lines.append("  " + line.strip() if lines[-1] else line.strip())
        else:
            within = within and not line
            lines.append(line)
    return "\n".join(lines)


class HouseStyle(griffe.Extension):
    """Converts docstrings before they are rendered."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = as_markdown(obj.docstring.value)
