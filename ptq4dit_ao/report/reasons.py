"""Why sites were not balanced, each reason once."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PLACE = re.compile(r"(\S+|its input): ")
"""Where a reason was met: a node such as ``gelu_3``, or a site. It stands before the reason and is no part of it."""


def by_reason(refusals: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names of what was refused, under the reason without its place; the commonest reason first.

    Args:
        refusals: a name and why it was refused, such as ``("blocks.0.ff.net.2", "gelu: gelu does not commute")``.
    """
    found: dict[str, list[str]] = {}
    for name, why in refusals:
        found.setdefault(_PLACE.sub("", why, count=1) if _PLACE.match(why) else why, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
