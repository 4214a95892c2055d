"""Conversion of a quantized ``GraphModule`` to JSON and back.

The document holds everything except the values of the tensors::

    {"inputs": ["hidden_states", ...],   names of forward's arguments
     "in_spec": ..., "out_spec": ...,    their nesting, see specs.py
     "nodes": [...],                     see nodes.py and values.py
     "aliases": {"tied.weight": "weight"},
     "parameters": ["weight", ...]}      the other tensors are buffers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from ptq4dit_ao.artifact.nodes import node_to_json, nodes_from_json
from ptq4dit_ao.artifact.signature import signature_from_json, signature_to_json
from ptq4dit_ao.artifact.strict import check_keys, check_strings
from ptq4dit_ao.artifact.tensors import graph_tensors, parameter_names, stored_nodes, tensor_aliases
from ptq4dit_ao.errors import ArtifactError

__all__ = ["graph_from_json", "graph_tensors", "graph_to_json"]

_KEYS = {"inputs", "in_spec", "out_spec", "nodes", "aliases", "parameters"}


def graph_to_json(gm: GraphModule) -> dict[str, Any]:
    """Encode the graph of an exported model as a JSON-safe dict. Its tensors are ``graph_tensors(gm)``.

    Checks that compute nothing (``_guards_fn``, ``_assert_tensor_metadata``), constants that nothing reads and node
    metadata are left out.

    Raises:
        ArtifactError: the graph is not from ``torch.export``, or holds something that has no stored form.
    """
    return {
        **signature_to_json(gm),
        "nodes": [node_to_json(node) for node in stored_nodes(gm)],
        "aliases": tensor_aliases(gm),
        "parameters": parameter_names(gm),
    }


def graph_from_json(
    doc: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | None = None
) -> GraphModule:
    """Decode a module that ``graph_to_json`` encoded, for inference: its parameters do not require gradients.

    Args:
        doc: a document of ``graph_to_json``, perhaps from a file of unknown origin.
        tensors: the tensors of ``graph_tensors``. They are used without a copy.
        device: replaces every device that the graph names; None keeps them.

    Raises:
        ArtifactError: the document is damaged, calls a function that it may not call, or belongs to other tensors.
    """
    check_keys(doc, _KEYS, "graph")
    graph = nodes_from_json(doc["nodes"], device)
    graph.set_codegen(signature_from_json(doc, graph))
    values = {**tensors, **_aliased(doc["aliases"], tensors)}
    _check_names(values, graph)
    frozen = _as_parameters(check_strings(doc["parameters"], "parameters"), values)
    return _compile(_module_tree({**values, **frozen}), graph)


def _compile(root: torch.nn.Module, graph: Graph) -> GraphModule:
    try:
        return GraphModule(root, graph).eval()
    except Exception as error:  # any error of torch.fx when it prints a call with wrong arguments as source
        raise ArtifactError(f"torch.fx cannot build the graph ({error!r}); copy or save the model again") from error


def _aliased(aliases: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(aliases, dict) or {*check_strings([*aliases.values()], "aliases")} - tensors.keys():
        raise ArtifactError(f"aliases {aliases!r} do not lead to stored tensors; save the model again")
    return {name: tensors[owner] for name, owner in aliases.items()}


def _check_names(values: Mapping[str, Tensor], graph: Graph) -> None:
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    if missing := read - values.keys():
        raise _mismatch("lack", missing)
    if extra := values.keys() - read:
        raise _mismatch("also hold", extra)


def _mismatch(verb: str, names: set[str]) -> ArtifactError:
    return ArtifactError(
        f"the weights {verb} {', '.join(sorted(names))}, other than the graph reads; graph and weights belong to "
        f"different models, copy or save the model again"
    )


def _as_parameters(names: list[str], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of these names and their aliases as parameters, one for each tensor."""
    if unknown := set(names) - values.keys():
        raise ArtifactError(f"parameters {sorted(unknown)} are not among the weights; save the model again")
    frozen = {id(values[name]): torch.nn.Parameter(values[name], requires_grad=False) for name in names}
    return {name: frozen[id(value)] for name, value in values.items() if id(value) in frozen}


def _module_tree(values: Mapping[str, Tensor]) -> torch.nn.Module:
    """A module tree that holds each tensor under its dotted name."""
    root = torch.nn.Module()
    for name, value in values.items():
        *path, leaf = name.split(".")
        try:
            _register(_submodule(root, path), leaf, value)
        except (KeyError, AttributeError) as error:
            raise ArtifactError(
                f"tensor name {name!r} is taken by another one ({error}); save the model again"
            ) from error
    return root


def _register(module: torch.nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def _submodule(root: torch.nn.Module, path: list[str]) -> torch.nn.Module:
    for part in path:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    return root
