"""The command line, called in this process."""

from __future__ import annotations

import logging

import pytest
from diffusers.utils.logging import enable_progress_bar

from ptq4dit_ao.cli.main import main
from ptq4dit_ao.cli.noise import ENVIRONMENT, LOGGED


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Wide lines, and logging afterwards as it was before."""
    monkeypatch.setenv("COLUMNS", "300")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    root = logging.getLogger()
    handlers, level = root.handlers[:], logging.getLogger("ptq4dit_ao").level
    yield
    root.handlers[:] = handlers
    logging.getLogger("ptq4dit_ao").setLevel(level)
    for line in LOGGED:
        logging.getLogger(line.logger).removeFilter(line)
    enable_progress_bar()


@pytest.fixture
def run(capsys):
    """``run(*arguments) -> (exit code, stdout, stderr)``."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()

    return call
