"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptq4dit_ao._atomic import temporary_folder


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """The same name in an empty folder, whose files take their places beside ``path`` when the block ends.

    What was there before is replaced, ``path`` itself last. Subfolders are dropped, and everything if the block fails.
    """
    with temporary_folder(path) as folder:
        unfinished = folder / path.name
        yield unfinished
        for file in sorted(folder.iterdir(), key=lambda file: file == unfinished):
            if file.is_file():
                os.replace(file, path.with_name(file.name))
