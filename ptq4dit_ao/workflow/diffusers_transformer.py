"""A lowered model in the place of a pipeline's transformer. Needs diffusers: import it in functions only."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.capture.interface import fit_inputs
from ptq4dit_ao.capture.signature import CallSignature, tensors_like
from ptq4dit_ao.errors import AbsentError, ArgumentError
from ptq4dit_ao.lowering import LoweredModel
from ptq4dit_ao.workflow.closed import (
    BUILT,
    REFUSED,
    STRUCTURE,
    TRAINING,
    WEIGHTS,
    Closed,
    close_parts,
    own_tensors,
    refusing,
)

logger = logging.getLogger(__name__)

BINNED = ("HunyuanDiT", "PRX", "PixArt", "Sana")
"""How the classes begin whose pipelines take ``use_resolution_binning``."""

BY_COMPILERS = (("training", False), ("_is_torch_compile", True))
"""What ``torch.compile`` sets on the model that it wraps; both change nothing."""

_WARNED: WeakSet[LoweredModel] = WeakSet()
"""Lowered models whose output did not fit float16."""


class QuantizedTransformer(Closed, ModelMixin, ConfigMixin):
    """A lowered model with the call, the configuration and the sizes of the diffusers model that it was.

    Inputs are cast to what the graph takes, and outputs back to the dtype of the first floating input. A call that the
    graph was not captured for is an error, never another result. So is whatever would change what a model computes or
    where: methods that it does not have, attributes that are set, hooks on it or on its blocks. Only forward hooks on
    the transformer itself work, for they see its calls.
    """

    is_cache_enabled = False

    def __init__(
        self, lowered: LoweredModel, original: Any, call: CallSignature, dtype: torch.dtype | None = None
    ) -> None:
        """``original`` is the diffusers model without weights, on the meta device; ``dtype`` is what it passes for."""
        self.__dict__["_original"] = original
        super().__init__()
        ConfigMixin.register_to_config(self, **original.config)
        sizes = {flag: original.num_parameters(exclude_embeddings=flag) for flag in (False, True)}
        close_parts(original)
        # Widths, numbers of blocks, makers of position ids: pipelines read them, and none of them needs weights.
        dropped = own_tensors(original)
        public = {x: value for x, value in vars(original).items() if not x.startswith("_") and x not in dropped}
        self.__dict__.update(public | original._modules)
        self._modules.update(original._modules)
        graph_dtype = next((spec.dtype for spec in lowered.inputs if spec.dtype.is_floating_point), torch.float32)
        # With the original's signature, which modular pipelines look at.
        forward = torch.compiler.disable(functools.partial(run_as, original, call, lowered), reason=BUILT)
        self.__dict__.update(
            training=False,
            forward=functools.wraps(original.forward)(forward),
            lowered=lowered,
            _dropped=dropped,
            _dtype=dtype or graph_dtype,
            _sizes=sizes,
        )

    def __setattr__(self, name: str, value: object) -> None:
        if "_sizes" not in self.__dict__:  # the classes of diffusers, while it is made
            self.__dict__[name] = value
        elif (name, value) not in BY_COMPILERS:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_dropped", ()):
            self._refuse(f"has no {name}", WEIGHTS, AbsentError)
        if name in REFUSED or hasattr(type(self.__dict__["_original"]), name):
            self._refuse(f"has no {name}", REFUSED.get(name, STRUCTURE), AbsentError)
        return super().__getattr__(name)

    def __copy__(self) -> QuantizedTransformer:
        other = object.__new__(type(self))
        hooks = {name: value.copy() for name, value in vars(self).items() if name.endswith(("_hooks", "_with_kwargs"))}
        other.__dict__.update(vars(self) | hooks)
        return other

    def __deepcopy__(self, memo: object) -> QuantizedTransformer:
        """Shares what runs, which does not change."""
        return copy.copy(self)

    def __reduce_ex__(self, protocol: object) -> Any:
        return self.lowered.__reduce_ex__(protocol)

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
        own = self.device
        same = device is None or (device.type, device.index or 0) == (own.type, own.index or 0)
        return self if same and dtype in (None, self.dtype) else self._apply(None)

    def cpu(self) -> QuantizedTransformer:
        """As ``to``; so are the three that follow."""
        return self.to("cpu")

    def float(self) -> QuantizedTransformer:
        return self.to(torch.float32)

    def half(self) -> QuantizedTransformer:
        return self.to(torch.float16)

    def bfloat16(self) -> QuantizedTransformer:
        return self.to(torch.bfloat16)

    def _apply(self, fn: object, recurse: bool = True) -> NoReturn:
        """What ``double``, ``cuda`` and the like come down to."""
        raise ArgumentError(
            f"a quantized transformer stays on {self.device} and in {self.dtype}; lower it for another device, make it "
            "with as_diffusers_transformer(..., dtype=...) for another dtype, and move the pipeline's other components "
            f"(from_pipe: with transformer=pipe.transformer, torch_dtype={self.dtype})"
        )

    def train(self, mode: bool = True) -> QuantizedTransformer:
        """Itself; raises ArgumentError for training mode."""
        if mode:
            self._refuse("has no training mode", TRAINING)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTransformer:
        """Itself; raises ArgumentError if gradients are asked for."""
        if requires_grad:
            self._refuse("has no gradients", TRAINING)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: there are no gradients."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the float model; none is trainable."""
        return 0 if only_trainable else self._sizes[exclude_embeddings]

    def save_pretrained(self, save_directory: object, *args: object, **kwargs: object) -> NoReturn:
        """Raises ArgumentError: diffusers could not read it."""
        raise ArgumentError(
            "a lowered transformer is not saved with its pipeline; save the quantized model with save_quantized, and "
            "the pipeline with its transformer set to None"
        )


for _name in REFUSED:
    if hasattr(QuantizedTransformer, _name):  # what is left of them is in no base class, and never found
        setattr(QuantizedTransformer, _name, refusing(_name))


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
    binned = type(original).__name__.startswith(BINNED)
    found = tree_leaves(lowered(*fit_inputs(lowered.inputs, tensors, binned=binned)))
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)
    outputs = [x.to(dtype=dtype) if x.is_floating_point() else x for x in found]
    if dtype is torch.float16:
        _warn_of_overflow(lowered, found, outputs)
    kind = output_class(type(original))
    if len(outputs) > len(fields(kind)):
        outputs = [outputs]  # the samples are a list
    return kind(*outputs) if return_dict else tuple(outputs)


def _warn_of_overflow(lowered: LoweredModel, found: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Once for each model: float16 ends at 65504."""
    lost = [x.abs().max() for x, y in zip(found, outputs, strict=True) if not y.isfinite().all()]
    largest = max(map(float, lost), default=0.0)
    if torch.finfo(torch.float16).max < largest < torch.inf and lowered not in _WARNED:
        _WARNED.add(lowered)
        logger.warning(
            "the output of a quantized transformer reaches %.3g, which is infinite in float16, its inputs' dtype; "
            "run the pipeline in bfloat16, with as_diffusers_transformer(..., dtype=torch.bfloat16), or in float32",
            largest,
        )


def output_class(kind: type) -> type:
    """What ``forward`` of a diffusers model returns with ``return_dict=True``: the output class that it names."""
    forward = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    named = [forward.__globals__.get(name) for name in forward.__code__.co_names]
    return next((x for x in named if isinstance(x, type) and issubclass(x, BaseOutput)), Transformer2DModelOutput)
