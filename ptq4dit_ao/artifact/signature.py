"""Signature of an exported model's ``forward``: its arguments and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Graph, GraphModule
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from ptq4dit_ao.artifact.names import check_identifier
from ptq4dit_ao.artifact.specs import spec_from_json, spec_to_json
from ptq4dit_ao.artifact.strict import check_strings
from ptq4dit_ao.errors import ArtifactError


def signature_to_json(gm: GraphModule) -> dict[str, Any]:
    """JSON of an exported module's signature, ``{"inputs": names, "in_spec": nesting, "out_spec": nesting}``.

    Raises:
        ArtifactError: the module was not exported, or takes or returns other containers than tuple, list and dict.
    """
    codegen = gm.graph._codegen
    if type(codegen) is not _PyTreeCodeGen or codegen.pytree_info.out_spec is None:
        raise ArtifactError(
            f"the graph has a {type(codegen).__name__}, not the signature of an exported model; capture the model "
            f"with torch.export.export(...).module(check_guards=False)"
        )
    info = codegen.pytree_info
    _check_inputs(info)
    return {
        "inputs": list(info.orig_args),
        "in_spec": spec_to_json(info.in_spec),
        "out_spec": spec_to_json(codegen.pytree_info.out_spec),
    }


def signature_from_json(doc: Mapping[str, Any], graph: Graph) -> _PyTreeCodeGen:
    """Read the signature that ``signature_to_json`` wrote, for a graph with as many inputs and outputs.

    Raises:
        ArtifactError: the JSON is damaged, or of another graph.
    """
    out_spec = spec_from_json(doc["out_spec"])
    info = _PyTreeInfo(check_strings(doc["inputs"], "inputs"), spec_from_json(doc["in_spec"]), out_spec)
    _check_inputs(info)
    _check_count("inputs", len(graph.find_nodes(op="placeholder")), info.in_spec.num_leaves)
    (output,) = graph.find_nodes(op="output")
    results = output.args[0] if output.args else None
    _check_count("outputs", len(results) if isinstance(results, (tuple, list)) else 0, out_spec.num_leaves)
    return _PyTreeCodeGen(info)


def _check_inputs(info: _PyTreeInfo) -> None:
    """Check that each argument of ``forward(*args, **kwargs)`` has a name. torch.fx writes names into source code."""
    children = info.in_spec.children() if info.in_spec.type is tuple else []
    if [child.type for child in children] != [tuple, dict]:
        raise ArtifactError(f"the inputs nest as {info.in_spec}, not as (args, kwargs); export the model again")
    args, kwargs = children
    for name in (*info.orig_args, *kwargs.context):
        check_identifier(name, "input")
    _check_count("argument names", len(set(info.orig_args)), len(args.children()) + len(kwargs.children()))


def _check_count(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ArtifactError(f"the graph has {found} {what} where its signature has {expected}; save the model again")
