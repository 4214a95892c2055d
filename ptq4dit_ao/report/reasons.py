"""Refusals of sites, grouped by their reason."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PLACE = re.compile(r"(\S+|its input): ")
"""The place that a refusal begins with: a node such as ``gelu_3``, or a site."""


def by_reason(refusals: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names of what was refused, under the reason without its place; the commonest reason first.

    Args:
        refusals: a name and why it was refused, such as ``("blocks.0.ff.net.2", "gelu: gelu does not commute")``.
    """
    found: dict[str, list[str]] = {}
    for name, why in refusals:
        found.setdefault(_PLACE.sub("", why, count=1) if _PLACE.match(why) else why, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
