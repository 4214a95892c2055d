"""The guides' code runs as written; every page's commands and recipes exist, and its links lead somewhere."""

from __future__ import annotations

import configparser
import copy
import re
from pathlib import Path

import torch
from _links import broken_links

from ptq4dit_ao.cli.main import build_parser
from ptq4dit_ao.recipe import shipped_recipes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def test_rounding(tiny_dit, tiny_samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"model": tiny_dit, "samples": tiny_samples}
    for snippet in snippets("guides/rounding.md"):
        exec(compile(snippet, "rounding.md", "exec"), scope)
    output = scope["quantized"](*tiny_samples[-1])
    assert (output - tiny_dit(*tiny_samples[-1]).sample).square().mean() < 0.05 * output.square().mean()


def test_the_recipes_to_extend_are_those_that_ship():
    named = re.findall(
        r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", (DOCS / "guides/rounding.md").read_text(), re.M))
    )
    assert len(named) == 13 and set(named) <= set(shipped_recipes())


def test_balance_once(tiny_dit, tiny_samples, capsys):
    (snippet,) = snippets("guides/balance_once.md")
    with torch.no_grad():
        expected = tiny_dit(*tiny_samples[-1]).sample
        scope = {"model": copy.deepcopy(tiny_dit), "inputs": tiny_samples[0], "batches": tiny_samples}
        exec(compile(snippet, "balance_once.md", "exec"), scope)
        assert torch.allclose(scope["balanced"](*tiny_samples[-1]), expected, atol=1e-4)
    assert len(scope["report"].outcomes) == 7 and scope["report"].output_change < 1e-5


def test_the_commands_exist():
    """Of every page but the reference of commands, which shows a grammar."""
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    for page in PAGES - {"cli_reference.md"}:
        text = (DOCS / page).read_text().replace("\\\n", " ")
        for command in re.findall(r"^\$ ptq4dit-ao ([^#\n]+)", text, flags=re.MULTILINE):
            args = build_parser().parse_args(command.split())
            if args.command == "quantize" and not args.recipe.endswith(".yaml"):
                assert args.recipe in shipped_recipes(), page
        for name in re.findall(r"tox run -e (\w+)", text):
            assert f"testenv:{name}" in tox, page
        for script in re.findall(r"\bpython ([\w/]+\.py)", text):
            assert (ROOT / script).exists(), f"{page}: {script}"


def test_the_links_lead_somewhere_on_a_forge():
    """In the source; ``tox run -e docs`` follows those of the site."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            target = ((DOCS / page).parent / file).resolve() if file else DOCS / page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}"


def anchors(page: Path) -> set[str]:
    """As a forge makes them of headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_gallery_has_every_picture():
    shown = set(re.findall(r"\]\(images/([^)]+)\)", (DOCS / "gallery.md").read_text()))
    assert shown == {path.name for path in (DOCS / "images").iterdir()}


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#here">B</a><a href="https://example.org">-</a>'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#top">A</a><a href="a.html#gone">A</a><img src="c.png">')
    assert list(broken_links(tmp_path)) == ["a.html: b.html#here", "b.html: a.html#gone", "b.html: c.png"]
