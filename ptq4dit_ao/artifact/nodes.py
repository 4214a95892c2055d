"""Nodes of a graph as JSON: a list of ``{"name", "op", "target", "args", "kwargs"}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from ptq4dit_ao.artifact.names import check_attribute_path, check_identifier
from ptq4dit_ao.artifact.strict import check_keys
from ptq4dit_ao.artifact.targets import target_from_str, target_to_str
from ptq4dit_ao.artifact.values import decode_value, encode_value
from ptq4dit_ao.errors import ArtifactError

_KEYS = {"name", "op", "target", "args", "kwargs"}
_ARGUMENT_COUNTS = {"placeholder": 0, "get_attr": 0, "output": 1}


def node_to_json(node: Node) -> dict[str, Any]:
    """One node as JSON.

    Raises:
        ArtifactError: a part of the node has no stored form. The message names both.
    """
    try:
        _check_arguments(node.op, node.args, node.kwargs)
        return {
            "name": check_identifier(node.name, "node"),
            "op": node.op,
            "target": target_to_str(node.target) if node.op == "call_function" else _check_target(node.op, node.target),
            "args": [encode_value(arg) for arg in node.args],
            "kwargs": {key: encode_value(value) for key, value in node.kwargs.items()},
        }
    except ArtifactError as error:
        raise ArtifactError(f"node {node.name!r}: {error}") from error


def nodes_from_json(entries: Any, device: torch.device | None) -> Graph:
    """A graph of stored nodes, with their names. ``device`` replaces every device among the arguments.

    Raises:
        ArtifactError: the entries are damaged, or call a function that a stored graph may not call.
    """
    if not isinstance(entries, list):
        raise ArtifactError(f"nodes is a {type(entries).__name__}, not a list; save the model again")
    graph = Graph()
    nodes: dict[str, Node] = {}
    for entry in entries:
        check_keys(entry, _KEYS, "node")
        name = check_identifier(entry["name"], "node")
        if name in nodes:
            raise ArtifactError(f"two nodes are called {name!r}; save the model again")
        try:
            nodes[name] = _add_node(graph, entry, nodes, device)
        except ArtifactError as error:
            raise ArtifactError(f"node {name!r}: {error}") from error
    if "output" not in [node.op for node in graph.nodes][-1:] or len(graph.find_nodes(op="output")) != 1:
        raise ArtifactError("the graph does not end in its only output node; save the model again")
    return graph


def _add_node(graph: Graph, entry: dict[str, Any], nodes: dict[str, Node], device: torch.device | None) -> Node:
    op, target, args, kwargs = entry["op"], entry["target"], entry["args"], entry["kwargs"]
    if [type(v) for v in (op, target, args, kwargs)] != [str, str, list, dict]:
        raise ArtifactError("op, target, args and kwargs are not str, str, list and object; save the model again")
    _check_arguments(op, args, kwargs)
    node = graph.create_node(
        op,
        target_from_str(target) if op == "call_function" else _check_target(op, target),
        tuple(decode_value(arg, nodes, device) for arg in args),
        {check_identifier(key, "keyword"): decode_value(value, nodes, device) for key, value in kwargs.items()},
        name=entry["name"],
    )
    _set_name(node, entry["name"])
    return node


def _check_target(op: object, target: object) -> str:
    """The checked target of a node that calls no function."""
    match op:
        case "get_attr":
            return check_attribute_path(target)
        case "placeholder" | "output":
            return check_identifier(target, str(op))
    raise ArtifactError(
        f"op {op!r} (target {target!r}) cannot be stored; a stored graph consists of placeholder, get_attr, "
        f"call_function and output nodes, as torch.export makes it"
    )


def _check_arguments(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that only calls have arguments: torch.fx writes a placeholder's default into source without quoting it."""
    expected = _ARGUMENT_COUNTS.get(op)
    if expected is not None and (len(args), len(kwargs)) != (expected, 0):
        raise ArtifactError(
            f"{op} nodes take {expected} arguments, found {len(args)} and {len(kwargs)} keywords; capture the model "
            f"with torch.export, which makes no default values"
        )


def _set_name(node: Node, name: str) -> None:
    """Name a node. Graph.create_node renames nodes that shadow a builtin, but passes that set names directly do not."""
    if node.name != name:
        node.name = name
        node.graph._graph_namespace._rename_object(node, name)
