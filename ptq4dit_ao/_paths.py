"""Paths given by users, and checks before the work that they can be written."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ptq4dit_ao._files import temporary_folder
from ptq4dit_ao.errors import ArgumentError, PTQ4DiTError, check_type


def as_path(path: str | os.PathLike[str], what: str = "path") -> Path:
    """A path with ``~`` expanded.

    Raises:
        ArgumentError: it is not a path, or an empty one, which would mean the current folder.
    """
    check_type(what, path, (str, os.PathLike), "a path as text")
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ArgumentError(f"{what} is {text!r}, which is no path; give a name ('.' is the current folder)")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ArgumentError(f"{what} is {text!r}, and there is no such user's home folder; write it out") from error


def check_writable(path: Path, error: type[PTQ4DiTError] = ArgumentError) -> None:
    """Check that something can be created or replaced at ``path``, by creating a folder beside it for a moment.

    Raises:
        error: it cannot.
    """
    path = path.resolve()
    if not path.name:
        raise error(f"cannot write {path}: it is the root of all folders; give the name of one in it")
    try:
        with _folder_for(path), temporary_folder(path):
            pass
    except OSError as problem:
        raise error(cannot_write(path, problem)) from problem


def check_file(path: Path, error: type[PTQ4DiTError] = ArgumentError) -> None:
    """Check that a file can be written.

    Raises:
        error: it cannot, or there is a folder of that name.
    """
    if path.is_dir():
        raise error(f"cannot write {path}: it is a folder; give the name of a file in it")
    check_writable(path, error)


def check_room(path: Path, needed: int, error: type[PTQ4DiTError] = ArgumentError) -> None:
    """Check that the disk has room for ``needed`` bytes at ``path``.

    Raises:
        error: it does not.
    """
    free = shutil.disk_usage(_existing(path)).free
    if free < needed:
        raise error(
            f"no room for {path}: it takes {_megabytes(needed)} at least, and {_megabytes(free)} are free there; make "
            "room, or write to another disk"
        )


def cannot_write(path: Path, problem: OSError) -> str:
    """One sentence for an error of the operating system while writing."""
    return f"cannot write {path}: {because(problem)}; choose a place that you may write to"


def error_number(error: Exception) -> int | None:
    """The number of a system's error; safetensors reports it only in the message. None without one."""
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    return int(hidden[1]) if hidden else getattr(error, "errno", None)


def because(problem: OSError) -> str:
    """Message of an error of the operating system, without its number."""
    if problem.strerror is None:
        return str(problem)
    where = "" if problem.filename is None else f" ({os.fsdecode(problem.filename)})"
    return f"{problem.strerror}{where}"


@contextmanager
def _folder_for(path: Path) -> Iterator[None]:
    """Create the folder of ``path`` for the block, and remove it afterwards if it did not exist."""
    missing = [folder for folder in path.parents if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        yield
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # another process has put something there
                folder.rmdir()


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
