"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """The same name in an empty folder, whose files take their places beside ``path`` when the block ends.

    What was there before is replaced, ``path`` itself last. Subfolders are dropped, and everything if the block fails.
    """
    # The folder is a sibling, for a rename is atomic within one file system only.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == unfinished):
            if file.is_file():
                os.replace(file, path.with_name(file.name))
