"""Files that are either the old one or the complete new one, whatever happens in between."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside ``path`` to write into: it takes that place when the block ends, and is removed when it fails.

    Its name starts with a dot and is nobody else's. It gets the mode that any new file has here, whatever writes it:
    safetensors makes its files private.
    """
    path = Path(path)
    # A sibling, for a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text in place of what was there."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_unfinished(path: Path) -> bool:
    """Is it what a kill inside :func:`replacing_file` leaves behind?"""
    return path.name.startswith(".") and ".tmp-" in path.name
