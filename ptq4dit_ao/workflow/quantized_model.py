"""A quantized model in memory and on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast, overload

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.artifact import ArtifactSize, read_artifact, write_artifact
from ptq4dit_ao.calibration import Sampling
from ptq4dit_ao.capture.interface import CapturedModule, InputSpec, free_sizes, set_interface
from ptq4dit_ao.capture.sizes import FreeSizes
from ptq4dit_ao.errors import ArgumentError, ArtifactError, check_type
from ptq4dit_ao.lowering import LoweredModel, lower
from ptq4dit_ao.modules.linears import ModuleLinear, from_stored, to_list, to_tensors
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.report import Report, size_entry, summary


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """A quantized model: its converted graph, recipe, inputs and report."""

    graph: GraphModule
    """The converted graph."""
    recipe: Recipe
    inputs: tuple[InputSpec, ...]
    """Dtype and shape of each input of the graph."""
    report: Report
    """Report of the quantization, see :mod:`ptq4dit_ao.report.types`. Its ``size`` is known for a saved model."""
    sampling: Sampling | None = None
    """Sampling of the model, where it is known."""
    captured: CapturedModule | None = None
    """Interface of the diffusers model that the graph was captured from, if it was one.

    See :func:`~ptq4dit_ao.as_diffusers_transformer`.
    """
    linears: tuple[ModuleLinear, ...] | None = None
    """The quantized linears as parts of the module, for :func:`~ptq4dit_ao.to_module`; None if they were not stored."""

    @property
    def sizes(self) -> FreeSizes:
        """Sizes of the inputs that may differ from call to call."""
        return free_sizes(self.graph)

    def lower(
        self,
        backend: str = "fbgemm",
        *,
        float_dtype: torch.dtype | None = None,
        example_inputs: Sequence[Tensor] | None = None,
        allow_float_fallback: bool = False,
        verify: bool = True,
        consume: bool = False,
    ) -> LoweredModel:
        """Lower the model to a backend and verify the result; see :func:`ptq4dit_ao.lower`."""
        lowered = lower(
            self.graph,
            backend,
            example_inputs=example_inputs,
            float_dtype=float_dtype,
            allow_float_fallback=allow_float_fallback,
            verify=verify,
            consume=consume,
        )
        lowered.captured = self.captured
        return lowered

    def save(self, directory: str | Path) -> ArtifactSize:
        """Save the model to a folder; see :func:`save_quantized`."""
        return save_quantized(self, directory)

    def __copy__(self) -> QuantizedModel:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        return replace(self, graph=copy.deepcopy(self.graph, memo), report=copy.deepcopy(self.report, memo))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ArgumentError(
            "a quantized model cannot be pickled, as torch.save and other processes would; write it with "
            "save_quantized, and read it there with load_quantized"
        )


def save_quantized(model: QuantizedModel, directory: str | Path) -> ArtifactSize:
    """Write a folder of JSON and safetensors files, atomically. An earlier artifact in the folder is replaced.

    Raises:
        ArtifactError: the folder holds something else, or cannot be written.
    """
    check_type("model", model, QuantizedModel, "what apply_recipe returned")
    return write_model(model, directory)[1]


def write_model(
    model: QuantizedModel, directory: str | Path, beside: Callable[[Path, Report], None] | None = None
) -> tuple[QuantizedModel, ArtifactSize]:
    """Save a model as :func:`save_quantized` does, and return it with its size in its report.

    Args:
        model: the model to save.
        directory: the folder.
        beside: writes further files into the folder before it appears, such as the report as it is stored.
    """
    report = copy.copy(model.report)

    def metadata(stored_bytes: int) -> dict[str, Any]:
        report["size"] = size_entry(report, model.graph, stored_bytes)
        return {
            "recipe": model.recipe.to_dict(),
            "report": summary(report),
            "sampling": None if model.sampling is None else model.sampling.to_dict(),
            "captured": None if model.captured is None else model.captured.to_dict(),
            "sizes": model.sizes.to_dict(),
            "linears": None if model.linears is None else to_list(model.linears),
        }

    write_beside = None if beside is None else lambda folder: beside(folder, report)
    signature = [spec.to_dict() for spec in model.inputs]
    vectors = None if model.linears is None else to_tensors(model.linears)
    sizes = write_artifact(directory, model.graph, metadata, signature, write_beside, vectors)
    return replace(model, report=report), sizes


@overload
def load_quantized(directory: str | Path) -> QuantizedModel: ...


@overload
def load_quantized(
    directory: str | Path,
    backend: str,
    *,
    float_dtype: torch.dtype | None = ...,
    allow_float_fallback: bool = ...,
    verify: bool = ...,
) -> LoweredModel: ...


def load_quantized(
    directory: str | Path,
    backend: str | None = None,
    *,
    float_dtype: torch.dtype | None = None,
    allow_float_fallback: bool = False,
    verify: bool = True,
) -> QuantizedModel | LoweredModel:
    """Read a model that :func:`save_quantized` wrote. Neither the float model nor calibration data is needed.

    Args:
        directory: the folder.
        backend: if given, lower the model at once and return the lowered model. This takes less memory than ``lower``
            afterwards, because each weight is freed when it has been packed.
        float_dtype: as for :func:`~ptq4dit_ao.lower`.
        allow_float_fallback: as for :func:`~ptq4dit_ao.lower`.
        verify: as for :func:`~ptq4dit_ao.lower`.

    Raises:
        ArtifactError: the folder is missing, incomplete, altered, or of another format version.
        LoweringError: as for :func:`~ptq4dit_ao.lower`.
    """
    model = _read(directory)
    if backend is None:
        return model
    return model.lower(
        backend, float_dtype=float_dtype, allow_float_fallback=allow_float_fallback, verify=verify, consume=True
    )


def _read(directory: str | Path) -> QuantizedModel:
    stored = read_artifact(directory)
    metadata = stored.metadata
    if set(metadata) - {"sizes", "linears"} != {"recipe", "report", "sampling", "captured"}:
        raise ArtifactError(
            f"{directory} was not saved with save_quantized: its metadata holds {sorted(metadata)}; give the folder of "
            "a model that was"
        )
    report = metadata["report"]
    if isinstance(report, dict):
        report.setdefault("inputs", None)  # models of earlier versions
    if not isinstance(report, dict) or set(report) != set(Report.__annotations__):
        found = sorted(report) if isinstance(report, dict) else report
        raise ArtifactError(f"the report of {directory} holds {found!r}; quantize again")
    inputs = tuple(InputSpec.from_dict(entry) for entry in stored.input_signature)
    set_interface(stored.graph_module, inputs, FreeSizes.from_dict(metadata["sizes"]) if "sizes" in metadata else None)
    return QuantizedModel(
        graph=stored.graph_module,
        recipe=Recipe.from_dict(metadata["recipe"]),
        inputs=inputs,
        report=cast(Report, report),
        sampling=None if metadata["sampling"] is None else Sampling.from_dict(metadata["sampling"]),
        captured=_captured(metadata["captured"], len(inputs)),
        linears=None if stored.vectors is None else from_stored(metadata.get("linears"), stored.vectors),
    )


def _captured(data: object, inputs: int) -> CapturedModule | None:
    captured = None if data is None else CapturedModule.from_dict(data)
    if captured is not None and len(captured.call.names) != inputs:
        raise ArtifactError(
            f"the transformer's call has the tensors {captured.call.names}, the graph takes {inputs}; quantize again"
        )
    return captured
