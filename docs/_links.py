"""Every relative link and anchor of a built site leads somewhere: ``python docs/_links.py FOLDER``.

Links to other hosts are left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]


def pages_of(folder: Path) -> list[Path]:
    """All but the templates that a theme leaves among its static files."""
    return sorted(path for path in folder.rglob("*.html") if path.relative_to(folder).parts[0] != "_static")


def broken_links(folder: Path) -> Iterator[str]:
    """``PAGE: LINK`` for each link that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in pages_of(folder)}
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                yield f"{path.relative_to(folder.resolve())}: {link}"


def main(folder: str) -> int:
    broken = list(broken_links(Path(folder)))
    count = len(pages_of(Path(folder)))
    sys.stdout.write("".join(f"broken link in {line}\n" for line in broken))
    sys.stdout.write(f"{count} pages, {len(broken)} broken links\n")
    return 1 if broken or not count else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
