"""A folder that is either the old one or the complete new one, whatever happens in between."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptq4dit_ao._atomic import temporary_folder


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` that takes its place when the block ends, and is removed when it fails.

    A process killed inside the block leaves ``.NAME.tmp-XXXX`` behind, and ``target`` as it was. One killed in the
    instant between the two renames leaves the old folder as ``.NAME.old-XXXX``. The next replacement removes both.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as temporary:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        _swap(temporary, target)
        for former in set_aside(target):
            shutil.rmtree(former, ignore_errors=True)
    _sync(target.parent)


def set_aside(target: Path) -> list[Path]:
    """What interrupted replacements have left of ``target``, oldest name first."""
    if not target.parent.is_dir():
        return []
    return sorted(p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}.old-"))


def _swap(new: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


def _sync(path: Path) -> None:
    """Force a file, or the list of files in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
