"""The reference pages are what the code says, and every public name has an entry."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from _generate import COMMAND, cli_page, pages, recipe_page

import ptq4dit_ao
from ptq4dit_ao import errors
from ptq4dit_ao.cli.main import build_parser
from ptq4dit_ao.recipe import recipe_json_schema

DOCS = Path(__file__).parents[1] / "docs"
ENTRIES = re.findall(
    r"^\.\. (?:auto|py:)\w+:: (ptq4dit_ao[\w.]*)", "\n".join(p.read_text() for p in DOCS.glob("api/*.md")), re.MULTILINE
)
SUBPACKAGES = ("calibration", "lowering", "metrics", "ptqd", "recipe")


def named(name: str) -> Any:
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", sorted(pages()))
def test_a_page_is_current(name):
    assert (DOCS / name).read_text() == pages()[name], f"docs/{name} is not what the code says; run `{COMMAND}`"


def test_another_description_is_another_page():
    schema: dict[str, Any] = copy.deepcopy(recipe_json_schema())
    schema["$defs"]["Weights"]["properties"]["bits"]["description"] = "Something else."
    page = recipe_page(schema)
    assert "Something else." in page and page != (DOCS / "recipe_reference.md").read_text()


def test_every_key_has_an_entry():
    page = (DOCS / "recipe_reference.md").read_text()
    schema: dict[str, Any] = recipe_json_schema()
    keys = [*schema["properties"], *(key for part in schema["$defs"].values() for key in part["properties"])]
    assert [key for key in keys if not re.search(rf"`(\w+\.)?{key}`", page)] == []


def test_another_option_is_another_page():
    parser = build_parser()
    parser._subparsers._group_actions[0].choices["backends"].add_argument("--all", help="more than one")
    assert "* `--all ALL`: more than one" in cli_page(parser).splitlines()


def test_every_option_has_an_entry():
    page = (DOCS / "cli_reference.md").read_text()
    for name, command in build_parser()._subparsers._group_actions[0].choices.items():
        chapter = page.split(f"## `{name}`")[1].split("\n## ")[0]
        for option in {*command._option_string_actions} - {"-h", "--help"}:
            assert f"`{option}" in chapter, f"{name} {option}"


def test_every_public_name_stands_in_the_api_reference():
    names = [f"ptq4dit_ao.{name}" for name in ptq4dit_ao.__all__]
    assert [name for name in names if name not in ENTRIES] == []


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_every_public_name_of_a_subpackage_does(package):
    module = importlib.import_module(f"ptq4dit_ao.{package}")
    missing = [n for n in module.__all__ if not {f"ptq4dit_ao.{n}", f"ptq4dit_ao.{package}.{n}"} & set(ENTRIES)]
    assert missing == []


def test_every_error_does():
    kinds = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert [n for n in kinds if not {f"ptq4dit_ao.{n}", f"ptq4dit_ao.errors.{n}"} & set(ENTRIES)] == []


def test_what_has_an_entry_exists():
    for name in ENTRIES:
        assert named(name) is not None, name


def test_there_is_one_entry_for_each():
    assert sorted(ENTRIES) == sorted(set(ENTRIES))


def test_what_the_pages_import_stands_in_the_api_reference():
    pages = [path for path in DOCS.rglob("*.md") if path.parent.name != "maintainers"]  # which import internals
    texts = [path.read_text() for path in (*pages, DOCS.parent / "README.md")]
    imports = {pair for text in texts for pair in re.findall(r"^from (ptq4dit_ao[\w.]*) import ([\w, ]+)", text, re.M)}
    names = {f"{module}.{name.strip()}" for module, names in imports for name in names.split(",")}
    assert {name for name in names if name not in ENTRIES} == set()
