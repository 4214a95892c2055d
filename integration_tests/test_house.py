"""Rules of the code that no linter knows: names that hide modules, words that are listed twice, what a wheel holds."""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptq4dit_ao import choices

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ptq4dit_ao"
NOT_SHIPPED = {"tests", "testing"}
"""Folders that only tests import."""

NO_NOUN = tuple(
    f"{word} " for word in ["Of", "What", "How", "Why", "Where", "Which", "As", "For", "So", "Is", "Are", "Does"]
)
"""Beginnings of docstrings that need their neighbours to be understood."""

modules = [path for path in sorted(PACKAGE.rglob("*.py")) if "tests" not in path.parts]
packages = [path.parent for path in modules if path.name == "__init__.py"]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below constants and fields included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text


def words(node: ast.AST) -> frozenset[str] | None:
    """The strings of a literal type or tuple, if it has nothing else and at least two."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
        node = node.slice
    if not isinstance(node, ast.Tuple) or len(node.elts) < 2:
        return None
    values = [element.value for element in node.elts if isinstance(element, ast.Constant)]
    return frozenset(values) if len(values) == len(node.elts) and all(isinstance(v, str) for v in values) else None


@pytest.mark.parametrize("package", packages, ids=named)
def test_no_name_hides_a_module(package):
    """``from package import name`` would give the one, and ``import package.name`` the other."""
    inside = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    names: set[str] = set()
    for node in ast.walk(ast.parse((package / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            of_itself = node.module == ".".join(package.relative_to(ROOT).parts)
            names |= set() if of_itself else {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    assert not names & (inside - {"__init__"})


def test_a_docstring_begins_with_a_noun_or_a_verb():
    found = [
        f"{named(path)}:{line}: {text[:60]}"
        for path in modules
        for line, text in docstrings(ast.parse(path.read_text()))
        if text.startswith(NO_NOUN)
    ]
    assert not found


def test_choices_are_listed_once():
    listed = {frozenset(v) for name, v in vars(choices).items() if name.isupper() and isinstance(v, tuple)}
    again = [
        f"{named(path)}:{node.lineno}: {sorted(found)}"
        for path in modules
        if path.name != "choices.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if (found := words(node)) in listed
    ]
    assert not again


def test_the_wheel_has_every_package_but_those_of_tests():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    shipped = set(config["options"]["packages"].split())
    expected = {
        ".".join(package.relative_to(ROOT).parts) for package in packages if not NOT_SHIPPED & set(package.parts)
    }
    assert shipped == expected | {"ptq4dit_ao.recipes"}
