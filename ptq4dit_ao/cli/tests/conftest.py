"""The command line, called in this process."""

from __future__ import annotations

import logging

import pytest

from ptq4dit_ao.cli.main import main


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Wide lines, and logging afterwards as it was before."""
    monkeypatch.setenv("COLUMNS", "300")
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: log.level for name, log in _loggers().items()}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _loggers() -> dict[str, logging.Logger]:
    names = ["ptq4dit_ao", "torch", "torchao", "torch.utils._pytree", "diffusers"]
    return {name: logging.getLogger(name) for name in names}


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
