"""JSON Schema of a model, the part of it at a key path, and a description of the values that the part allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

Node = Mapping[str, object]

_UNIONS = ("oneOf", "anyOf")

_NOUNS = {"number": "numbers", "integer": "whole numbers", "string": "non-empty texts"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class _WithoutNull(GenerateJsonSchema):
    """Schema without null, because a file leaves out a key that is not set. ``None`` exists in Python only."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def model_json_schema(model: type[BaseModel]) -> dict[str, object]:
    """JSON Schema of any recipe model, for the values that a file may hold."""
    return model.model_json_schema(schema_generator=_WithoutNull)


def node_at(root: Node, path: Sequence[str | int]) -> Node:
    """Schema of the value at ``path`` (keys and list indices), with references resolved."""
    node = _resolved(root, root)
    for part in path:
        node = _resolved(root, _below(node, part))
    return node


def choices(node: Node) -> list[str]:
    """Names that ``node`` allows: keys of a mapping or values of an enumeration."""
    own = cast(Sequence[str], node.get("properties") or node.get("enum") or [])
    return list(own) or [name for branch in _branches(node) for name in choices(branch)]


def allowed(node: Node) -> str:
    """Description of the allowed values, as it reads after "it must be"."""
    if "const" in node:
        const = node["const"]
        return const if isinstance(const, str) else f"{str(const).lower()}, or left out"
    if "enum" in node:
        return f"one of {', '.join(choices(node))}"
    if "type" not in node:
        branches = _branches(node)
        return " or ".join(str(b["const"]).lower() if "const" in b else allowed(b) for b in branches)
    return _TYPES[str(node["type"])](node)


def _resolved(root: Node, node: Node) -> Node:
    reference = node.get("$ref")
    if reference is not None:
        definitions = cast(Mapping[str, Node], root["$defs"])
        node = definitions[str(reference).removeprefix("#/$defs/")]
    branches = {key: [_resolved(root, branch) for branch in _branches(node)] for key in _UNIONS if key in node}
    return {**node, **branches}


def _below(node: Node, part: str | int) -> Node:
    """Schema under a key or an index, from the one branch of a union that has it."""
    key = "properties" if isinstance(part, str) else "items"
    (inside,) = [branch[key] for branch in (node, *_branches(node)) if key in branch]
    return cast(Mapping[str, Node], inside)[part] if isinstance(part, str) else cast(Node, inside)


def _branches(node: Node) -> Sequence[Node]:
    return next((cast(Sequence[Node], node[key]) for key in _UNIONS if key in node), [])


def _range(node: Node, noun: str) -> str:
    if "minimum" in node and "maximum" in node:
        return f"{noun} from {node['minimum']} to {node['maximum']}"
    bounds = " and ".join(f"{sign} {node[key]}" for key, sign in _BOUNDS.items() if key in node)
    return f"{noun} {bounds}".rstrip()


def _list(node: Node) -> str:
    fewest = cast(int, node.get("minItems", 0))
    words = ["a", "non-empty" if fewest == 1 else "", "list of", f"at least {fewest}" if fewest > 1 else ""]
    words.append("different" if "uniqueItems" in node else "")
    items = cast(Node, node["items"])
    noun = _range(items, _NOUNS[kind]) if (kind := str(items.get("type"))) in _NOUNS else "mappings"
    return " ".join(word for word in (*words, noun) if word)


_TYPES: dict[str, Callable[[Node], str]] = {
    "integer": lambda node: _range(node, "a whole number"),
    "number": lambda node: _range(node, "a number"),
    "boolean": lambda node: "true or false",
    "string": lambda node: "non-empty text" if "minLength" in node else "text, in quotes where needed",
    "array": _list,
    "object": lambda node: f"a mapping (keys: {', '.join(choices(node))})",
}
