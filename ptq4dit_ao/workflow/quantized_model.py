"""A quantized model in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4dit_ao.artifact import ArtifactSize, read_artifact, write_artifact
from ptq4dit_ao.errors import ArtifactError
from ptq4dit_ao.graph.shapes import example_shape
from ptq4dit_ao.lowering import LoweredModel, lower
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.report import summary


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input of the graph; the first axis is the batch."""

    name: str
    shape: tuple[int, ...]
    """At the example inputs."""
    dtype: torch.dtype

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputSpec:
        dtype = getattr(torch, str(data.get("dtype")), None)
        if set(data) != {"name", "shape", "dtype"} or not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"input signature {dict(data)!r} is not one this version reads; quantize again")
        return cls(name=data["name"], shape=tuple(data["shape"]), dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """A converted graph with all that is known of it."""

    graph: GraphModule
    recipe: Recipe
    inputs: tuple[InputSpec, ...]
    report: dict[str, Any]
    sampling: dict[str, object] | None = None
    """How to sample it (:class:`~ptq4dit_ao.calibration.Sampling`), where that is known."""

    def lower(
        self,
        backend: str = "fbgemm",
        *,
        float_dtype: torch.dtype | None = None,
        allow_float_fallback: bool = False,
    ) -> LoweredModel:
        """Ready to run on a backend, proven; see :func:`ptq4dit_ao.lower`."""
        device = next((tensor.device for tensor in self.graph.buffers()), torch.device("cpu"))
        examples = tuple(torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in self.inputs)
        return lower(
            self.graph,
            backend,
            example_inputs=examples,
            float_dtype=float_dtype,
            allow_float_fallback=allow_float_fallback,
        )

    def save(self, directory: str | Path) -> ArtifactSize:
        """See :func:`save_quantized`."""
        return save_quantized(self, directory)


def input_specs(nodes: Sequence[Node]) -> tuple[InputSpec, ...]:
    """Specs of a graph's inputs."""
    return tuple(InputSpec(name=node.name, shape=example_shape(node), dtype=node.meta["val"].dtype) for node in nodes)


def save_quantized(model: QuantizedModel, directory: str | Path) -> ArtifactSize:
    """Write a folder of JSON and safetensors, atomically; an earlier artifact there is replaced.

    Raises:
        ArtifactError: the folder holds something else, or cannot be written.
    """
    metadata = {"recipe": model.recipe.to_dict(), "report": summary(model.report), "sampling": model.sampling}
    signature = [spec.to_dict() for spec in model.inputs]
    return write_artifact(directory, model.graph, metadata, signature)


def load_quantized(directory: str | Path) -> QuantizedModel:
    """Read what :func:`save_quantized` wrote; needs neither the float model nor calibration data.

    Raises:
        ArtifactError: the folder is missing, incomplete, altered, or of another format version.
    """
    stored = read_artifact(directory)
    metadata = stored.metadata
    if set(metadata) != {"recipe", "report", "sampling"}:
        raise ArtifactError(f"{directory} was not saved with save_quantized: its metadata holds {sorted(metadata)}")
    return QuantizedModel(
        graph=stored.graph_module,
        recipe=Recipe.from_dict(metadata["recipe"]),
        inputs=tuple(InputSpec.from_dict(entry) for entry in stored.input_signature),
        report=metadata["report"],
        sampling=metadata["sampling"],
    )
