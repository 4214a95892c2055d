"""Tests of ``pytest --require-run``, with which an environment whose tests are all skipped fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.skip(reason="no such machine")
def test_skipped(): ...

def test_passes(): ...
"""


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["-k", "skipped"], 0),
        (["-k", "skipped", "--require-run"], 1),
        (["-k", "skipped or passes", "--require-run"], 0),
        (["-k", "passes", "--require-run", "-n", "1"], 0),
    ],
)
def test_something_must_have_passed(tmp_path, options, code):
    (tmp_path / "test_two.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--rootdir", str(tmp_path), str(tmp_path), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("no test has passed" in done.stdout) == bool(code)
