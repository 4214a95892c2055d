"""A lowered model in the place of a pipeline's transformer. Needs diffusers: import it in functions only."""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import fields
from typing import Any, NoReturn

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.interface import fit_inputs
from ptq4dit_ao.graph.signature import CallSignature, tensors_like
from ptq4dit_ao.lowering import LoweredModel


class QuantizedTransformer(ModelMixin, ConfigMixin):
    """A lowered model with the call, the configuration and the sizes of the diffusers model that it was.

    Inputs are cast to what the graph takes, and outputs back to the dtype of the first floating input. A call that the
    graph was not captured for is an error, never another result.
    """

    is_cache_enabled = False

    def __init__(
        self, lowered: LoweredModel, original: Any, call: CallSignature, dtype: torch.dtype | None = None
    ) -> None:
        """``original`` is the diffusers model without weights, on the meta device; ``dtype`` is what it passes for."""
        super().__init__()
        self.register_to_config(**original.config)
        # Widths, numbers of blocks, makers of position ids: pipelines read them, and none of them needs weights.
        public = {name: value for name, value in vars(original).items() if not name.startswith("_")}
        self.__dict__.update({**public, **original._modules})
        self.lowered = lowered
        graph_dtype = next((spec.dtype for spec in lowered.inputs if spec.dtype.is_floating_point), torch.float32)
        self._dtype = dtype or graph_dtype
        # With the original's signature, which modular pipelines look at.
        self.forward = functools.wraps(original.forward)(functools.partial(run_as, original, call, lowered))

    def cache_context(self, name: str, **kwargs: object) -> contextlib.AbstractContextManager[None]:
        """Nothing: a graph keeps nothing from call to call."""
        return contextlib.nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        """What pipelines pass to it; the graph may compute in another one."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return next((x.device for x in (*self.lowered.parameters(), *self.lowered.buffers())), torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> QuantizedTransformer:
        """Itself; it cannot change.

        Raises:
            ArgumentError: the device or the dtype is another one.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        same_device = device is None or torch.empty(0, device=device).device == self.device
        return self if same_device and dtype in (None, self.dtype) else self._apply(None)

    def _apply(self, fn: object, recurse: bool = True) -> NoReturn:
        """What ``half``, ``cuda`` and the like come down to."""
        raise ArgumentError(
            f"a quantized transformer stays on {self.device} and in {self.dtype}; lower it for another device, make it "
            "with as_diffusers_transformer(..., dtype=...) for another dtype, and move the pipeline's other components"
        )

    def save_pretrained(self, save_directory: object, *args: object, **kwargs: object) -> NoReturn:
        """Raises ArgumentError: diffusers could not read it."""
        raise ArgumentError(
            "a lowered transformer is not saved with its pipeline; save the quantized model with save_quantized, and "
            "the pipeline with its transformer set to None"
        )


def run_as(original: Any, captured: CallSignature, lowered: LoweredModel, *args: Any, **kwargs: Any) -> Any:
    """Run a lowered model on the arguments of ``original.forward``, for what that returns.

    Raises:
        ArgumentError: the graph does not compute this call.
    """
    signature = inspect.signature(original.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{type(original).__name__} cannot be called so: {error}") from error
    given = {**dict(zip(signature.parameters, bound.args, strict=False)), **bound.kwargs}
    return_dict = given.pop("return_dict", True)
    tensors = tensors_like(captured, original, given)
    found = lowered(*fit_inputs(lowered.inputs, tensors))
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)
    outputs = [x.to(dtype=dtype) if x.is_floating_point() else x for x in tree_leaves(found)]
    kind = output_class(type(original))
    if len(outputs) > len(fields(kind)):
        outputs = [outputs]  # the samples are a list
    return kind(*outputs) if return_dict else tuple(outputs)


def output_class(kind: type) -> type:
    """What ``forward`` of a diffusers model returns with ``return_dict=True``: the output class that it names."""
    forward = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    named = [forward.__globals__.get(name) for name in forward.__code__.co_names]
    return next((x for x in named if isinstance(x, type) and issubclass(x, BaseOutput)), Transformer2DModelOutput)
