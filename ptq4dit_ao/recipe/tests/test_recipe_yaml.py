"""The YAML dialect of recipes: what a plain value means, where it stands, and what is refused."""

from __future__ import annotations

import math

import pytest

from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe.yaml_text import read_yaml, write_yaml

MEANING = {
    "1e-5": 1e-5,
    "1E3": 1000.0,
    "-.5": -0.5,
    "2.": 2.0,
    "+1.5e+2": 150.0,
    "-.inf": -math.inf,
    "12": 12,
    "-3": -3,
    "0": 0,
    "true": True,
    "false": False,
    # Text here, though YAML 1.1 reads booleans, octal, sexagesimal and grouped numbers, or a date.
    "on": "on",
    "off": "off",
    "yes": "yes",
    "no": "no",
    "True": "True",
    "010": "010",
    "1:30": "1:30",
    "1_000": "1_000",
    "2024-01-01": "2024-01-01",
    "e5": "e5",
    "1e": "1e",
    "none": "none",
    "'8'": "8",
    '"true"': "true",
    "[1, a]": [1, "a"],
    "{a: 1e0}": {"a": 1.0},
}


@pytest.mark.parametrize(("text", "value"), MEANING.items())
def test_plain_value(text: str, value: object) -> None:
    read = read_yaml(f"key: {text}", "x.yaml").value["key"]
    assert (type(read), read) == (type(value), value)


def test_a_quoted_key_is_text() -> None:
    assert read_yaml("'<<': 1\n'8': 2\n", "x.yaml").value == {"<<": 1, "8": 2}


def test_nan_is_a_number() -> None:
    read = read_yaml("key: .nan", "x.yaml").value["key"]
    assert isinstance(read, float)
    assert math.isnan(read)


@pytest.mark.parametrize(
    "text", ["1e-5", "on", "true", "010", "12", "", "~", "<<", "a: b", "- a", "#", "é\n x ", "\x85", "\u2028 a"]
)
def test_text_is_written_so_that_it_stays_text(text: str) -> None:
    assert read_yaml(write_yaml({"key": text}), "x.yaml").value == {"key": text}


def test_lines() -> None:
    read = read_yaml("# comment\na:\n  b: 1\n\n  c:\n    - 1\n    - d: 2\n", "x.yaml")
    assert read.lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 5,
        ("a", "c", 0): 6,
        ("a", "c", 1): 7,
        ("a", "c", 1, "d"): 7,
    }
    assert read.where(("a", "c", 1, "missing")) == "x.yaml:7"
    assert read.where(("missing",)) == "x.yaml"


def test_aliases_are_read() -> None:
    assert read_yaml("a: &x {b: 1}\nc: *x\n", "x.yaml").value == {"a": {"b": 1}, "c": {"b": 1}}


REFUSED = {
    "duplicate key": ("a: 1\nb: 2\na: 3", "x.yaml:3: a: already set on line 1; keep one of them"),
    "nested duplicate": ("a:\n  - b: 1\n    b: 1", "x.yaml:3: a[0].b: already set on line 2; keep one of them"),
    "empty value": ("a:\n  b:\n", "x.yaml:2: a.b: there is no value; write one or remove the key"),
    "null": ("a: [null]", "x.yaml:1: a[0]: there is no value; write one or remove the key"),
    "custom tag": ("a: !new 1", "x.yaml:1: a: the tag '!new' is not read; write a plain value"),
    "python tag": (
        "a: !!python/name:os.system x",
        "x.yaml:1: a: the tag '!!python/name:os.system' is not read; write a plain value",
    ),
    "standard tag": ("a: !!str 8", "x.yaml:1: a: the tag '!!str' is not read; write a plain value"),
    "tagged list": ("a: !!set [1]", "x.yaml:1: a: the tag '!!set' is not read; write a plain value"),
    "tagged file": ("!new\na: 1", "x.yaml:1: the tag '!new' is not read; write a plain value"),
    "merge key": (
        "a: &a {b: 1}\nc:\n  <<: *a",
        "x.yaml:3: c: merge keys ('<<') are not read; write the keys out or use 'extends'",
    ),
    "number as key": ("a: {8: 1}", "x.yaml:1: a: a key must be text, but '8' is not"),
    "list as key": ("? [a]\n: 1", "x.yaml:1: a key must be text, but a sequence is not"),
    "endless alias": (
        "a: &a\n  - *a",
        "x.yaml:1: a[0]: an alias inside its own anchor has no end; write the value out",
    ),
    "two documents": ("a: 1\n---\nb: 2", "x.yaml:3: a second document begins; a recipe is one document, see 'extends'"),
    "empty file": (
        "# only a comment",
        "x.yaml: a recipe is a mapping, but this file is empty; begin it with 'version: 1'",
    ),
    "list file": ("- a", "x.yaml: a recipe is a mapping, but this file is a sequence; begin it with 'version: 1'"),
    "text file": ("a", "x.yaml: a recipe is a mapping, but this file is a scalar; begin it with 'version: 1'"),
    "unclosed list": (
        "a: 1\nb: [1,\n",
        "x.yaml:3: this is not YAML: expected the node content, but found '<stream end>' (while parsing a flow node)",
    ),
    "tab": (
        "a:\n\tb: 1",
        "x.yaml:2: this is not YAML: found character '\\t' that cannot start any token "
        + "(while scanning for the next token)",
    ),
    "unknown alias": ("a: *b", "x.yaml:1: this is not YAML: found undefined alias 'b'"),
    "control character": (
        "a: \x01",
        "x.yaml: this is not YAML: unacceptable character #x0001: special characters are not allowed "
        + 'in "<unicode string>", position 3',
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, "x.yaml")
    assert str(caught.value) == message
