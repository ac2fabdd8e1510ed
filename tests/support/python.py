"""Runs Python code in a new process."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new interpreter that finds the same packages, but not the tests."""
    paths = [p for p in sys.path if p and pathlib.Path(p) != pathlib.Path(__file__).parents[1]]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def output(code: str, *arguments: str, **environment: str) -> str:
    result = python(code, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
