"""Quantized models on disk: the graph as JSON and the weights as safetensors, without pickle and float copies."""

from ptq4dit_ao.artifact.graph_json import graph_from_json, graph_tensors, graph_to_json
from ptq4dit_ao.artifact.manifest import ArtifactSize
from ptq4dit_ao.artifact.store import StoredModel, check_target, read_artifact, write_artifact
from ptq4dit_ao.core.int4 import pack_int4, unpack_int4

__all__ = [
    "ArtifactSize",
    "StoredModel",
    "check_target",
    "graph_from_json",
    "graph_tensors",
    "graph_to_json",
    "pack_int4",
    "read_artifact",
    "unpack_int4",
    "write_artifact",
]
