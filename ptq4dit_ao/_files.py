"""Atomic writing: files and folders are either the old ones or the complete new ones, whatever interrupts it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, removed with its content when the block ends.

    Its name starts with a dot and is unique. Such folders of the same target that killed processes have left behind are
    removed first. A folder in use is recognized by its lock, which ends with its process.
    """
    for left in _siblings(target):
        _remove_unlocked(left)
    temporary, lock = _locked_folder(target)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write into, which replaces ``path`` when the block ends, and is removed when the block fails.

    It gets the mode of any new file, whatever writes it: safetensors makes its files private.
    """
    path = Path(path)
    # The file is in a folder of its own, because safetensors first writes to a file of a random name, which a kill
    # would leave behind. The folder is a sibling, because a rename is atomic only within one file system.
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by UTF-8 text, atomically."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_json(path: str | os.PathLike[str], value: object) -> None:
    """Replace a file by a value as indented JSON, without NaN or infinity, atomically."""
    replace_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def replacing_files(path: Path) -> Iterator[Path]:
    """A path of the same name in an empty folder, whose files are moved beside ``path`` when the block ends.

    Existing files are replaced, ``path`` itself last. Subfolders are dropped, and everything if the block fails.
    """
    with temporary_folder(path) as folder:
        unfinished = folder / path.name
        yield unfinished
        for file in sorted(folder.iterdir(), key=lambda file: file == unfinished):
            if file.is_file():
                os.replace(file, path.with_name(file.name))


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, which replaces it when the block ends, and is removed when the block fails.

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
    """Old versions of ``target`` that interrupted replacements have left behind, sorted by name."""
    if not target.parent.is_dir():
        return []
    return sorted(p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}.old-"))


def remove_folder(folder: Path) -> None:
    """Remove a folder with its content. A kill leaves it whole, or as a folder that the next write there removes."""
    with temporary_folder(folder) as trash:
        os.rename(folder, trash / folder.name)


def is_unfinished(path: Path) -> bool:
    """Whether the path is a folder that a kill inside :func:`temporary_folder` left behind."""
    return path.name.startswith(".") and ".tmp-" in path.name


def _siblings(target: Path) -> list[Path]:
    return [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.tmp-")]


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        folder = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        _lock(descriptor)
        if folder.exists():  # another process may have removed it as a leftover before it was locked
            return folder, descriptor
        os.close(descriptor)


def _remove_unlocked(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process has removed it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if _lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock unless another process has it. Returns False also on systems without locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
    """Force a file, or the list of files in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
