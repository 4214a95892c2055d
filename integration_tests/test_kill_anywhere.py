"""Tests that a kill leaves nothing wrong; see ``kill_anywhere.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_anywhere.py")


@pytest.mark.parametrize(
    ("job", "kills"),
    [
        ("quantize", 2),
        ("save", 2),
        pytest.param("quantize", 30, marks=pytest.mark.slow),
        pytest.param("save", 30, marks=pytest.mark.slow),
        pytest.param("table", 30, marks=pytest.mark.slow),
    ],
)
def test_what_is_killed_is_absent_right_or_refused_and_goes_on(job: str, kills: int) -> None:
    command = [sys.executable, str(SCRIPT), "--jobs", job, "--kills", str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = result.stdout.splitlines()
    figures = json.loads(line)
    assert figures["wrong"] == [] and sum(figures["left"].values()) == kills
