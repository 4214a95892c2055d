"""Messages of the library in the words of the command line."""

from __future__ import annotations

import argparse
import re


def with_flags(text: str, args: argparse.Namespace) -> str:
    """A message that names a parameter (``model=...``), with the command's option (``--model``) where it has that."""

    def flag(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')}" if found[1] in vars(args) else found[0]

    return re.sub(r"\b(\w+)=\.\.\.", flag, text)
