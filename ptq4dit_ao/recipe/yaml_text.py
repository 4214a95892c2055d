"""Conversion of YAML text to Python values and back, with the line of every key.

Duplicate keys, tags, merge keys (``<<``), empty values and second documents are errors. Anchors and aliases are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import yaml  # type: ignore[import-untyped]

from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe.yaml_dialect import NULL, SCALARS, STR, Dumper, Loader, is_tagged

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a recipe to one value."""


@dataclass(frozen=True, kw_only=True)
class YamlText:
    """Content of one YAML text, with the 1-based line of each key and list item."""

    source: str
    value: dict[str, object]
    lines: Mapping[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """The line of ``path``, or of the nearest key above it that was written; 0 if there is none."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)

    def where(self, path: KeyPath) -> str:
        """The source and line, ``recipes/x.yaml:12``, or the source alone if the line is unknown."""
        line = self.line(path)
        return f"{self.source}:{line}" if line else self.source


def read_yaml(text: str, source: str) -> YamlText:
    """Read a mapping. Every error is a ``RecipeError`` that begins with ``source``, and the line if there is one."""
    try:
        return _read(text, source)
    except RecursionError:
        raise RecipeError(f"{source}: it is nested too deeply; a recipe has sections of plain values") from None


def _read(text: str, source: str) -> YamlText:
    root = _compose(text, source)
    if not isinstance(root, yaml.MappingNode):
        found = "empty" if root is None else f"a {root.id}"
        raise RecipeError(f"{source}: a recipe is a mapping, but this file is {found}; begin it with 'version: 1'")
    reader = _Reader(source)
    value = reader.mapping(root, ())
    return YamlText(source=source, value=value, lines=reader.lines)


def write_yaml(data: Mapping[str, object]) -> str:
    """YAML text that ``read_yaml`` reads back as ``data``, with the keys in their order."""
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))


def dotted(path: KeyPath) -> str:
    """A key path as text: ``("overrides", 0, "skip")`` is ``overrides[0].skip``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        loader = Loader(text)
        root = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            line = _line(loader.get_node())
            raise RecipeError(f"{source}:{line}: a second document begins; a recipe is one document, see 'extends'")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        context = f" ({error.context})" if error.context else ""
        raise RecipeError(f"{source}:{line}: this is not YAML: {error.problem}{context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: this is not YAML: {' '.join(str(error).split())}") from None
    return root


class _Reader:
    """A reader that turns nodes into Python values and records their lines."""

    def __init__(self, source: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._source = source
        self._open: list[yaml.Node] = []

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        self._check_tag(node, path)
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            here = (*path, key)
            if key in result:
                raise self._error(key_node, here, f"already set on line {self.lines[here]}; keep one of them")
            self.lines[here] = _line(key_node)
            result[key] = self._value(value_node, here)
        return result

    def _key(self, node: yaml.Node, path: KeyPath) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != STR:
            written = repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            raise self._error(node, path, f"a key must be text, but {written} is not")
        if node.value == "<<" and node.style is None:
            raise self._error(node, path, "merge keys ('<<') are not read; write the keys out or use 'extends'")
        return str(node.value)

    def _value(self, node: yaml.Node, path: KeyPath) -> object:
        if node in self._open:
            raise self._error(node, path, "an alias inside its own anchor has no end; write the value out")
        self._open.append(node)
        value = self._content(node, path)
        self._open.pop()
        return value

    def _content(self, node: yaml.Node, path: KeyPath) -> object:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        self._check_tag(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        if node.tag == NULL:
            raise self._error(node, path, "there is no value; write one or remove the key")
        try:
            return SCALARS[node.tag](node.value)
        except ValueError:  # Python reads no integers of thousands of digits
            digits = len(node.value)
            raise self._error(node, path, f"a number of {digits} digits is too long; write a shorter one") from None

    def _item(self, node: yaml.Node, path: KeyPath) -> object:
        self.lines[path] = _line(node)
        return self._value(node, path)

    def _check_tag(self, node: yaml.Node, path: KeyPath) -> None:
        if is_tagged(node):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise self._error(node, path, f"the tag '{tag}' is not read; write a plain value")

    def _error(self, node: yaml.Node, path: KeyPath, text: str) -> RecipeError:
        where = f"{dotted(path)}: " if path else ""
        return RecipeError(f"{self._source}:{_line(node)}: {where}{text}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
