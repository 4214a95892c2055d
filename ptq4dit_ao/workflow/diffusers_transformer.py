"""A lowered model as a pipeline's transformer. This module imports diffusers, so import it inside functions only."""

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
"""Prefixes of the class names whose pipelines take ``use_resolution_binning``."""

BY_COMPILERS = (("training", False), ("_is_torch_compile", True))
"""Attributes that ``torch.compile`` sets on the model that it wraps. They are accepted and have no effect."""

_WARNED: WeakSet[LoweredModel] = WeakSet()
"""Lowered models that have been warned of output beyond float16's range."""


class QuantizedTransformer(Closed, ModelMixin, ConfigMixin):
    """A lowered model with the call, the configuration and the sizes of the diffusers model that it was captured from.

    Inputs are cast to the dtypes of the graph, and outputs to the dtype of the first floating-point input. A call that
    the graph was not captured for raises an error and never returns a wrong result. The same holds for everything that
    would change the result or the device: missing methods, attributes that are set, hooks on the model or its blocks.
    Only forward hooks on the transformer itself are allowed, because they see its calls.
    """

    is_cache_enabled = False

    def __init__(
        self, lowered: LoweredModel, original: Any, call: CallSignature, dtype: torch.dtype | None = None
    ) -> None:
        """Wrap a lowered model.

        Args:
            lowered: the model to run.
            original: the diffusers model without weights, on the meta device.
            call: signature of the captured call.
            dtype: dtype that the module reports; the default is that of the graph.
        """
        self.__dict__["_original"] = original
        super().__init__()
        ConfigMixin.register_to_config(self, **original.config)
        sizes = {flag: original.num_parameters(exclude_embeddings=flag) for flag in (False, True)}
        close_parts(original)
        # Pipelines read widths, numbers of blocks and makers of position ids, none of which needs weights.
        dropped = own_tensors(original)
        public = {x: value for x, value in vars(original).items() if not x.startswith("_") and x not in dropped}
        self.__dict__.update(public | original._modules)
        self._modules.update(original._modules)
        graph_dtype = next((spec.dtype for spec in lowered.inputs if spec.dtype.is_floating_point), torch.float32)
        # Modular pipelines read the signature of forward, so it is the original's.
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
        if "_sizes" not in self.__dict__:  # diffusers' constructors set attributes until _sizes exists
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
        """Copy the module and share the lowered model, which does not change."""
        return copy.copy(self)

    def __reduce_ex__(self, protocol: object) -> Any:
        return self.lowered.__reduce_ex__(protocol)

    def cache_context(self, name: str, **kwargs: object) -> contextlib.AbstractContextManager[None]:
        """Return a context without effect: a graph keeps no state between calls."""
        return contextlib.nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the pipeline's inputs have. The graph may compute in another one."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device of the lowered model's weights."""
        return next((x.device for x in (*self.lowered.parameters(), *self.lowered.buffers())), torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> QuantizedTransformer:
        """Return the module itself, which cannot be moved or cast.

        Raises:
            ArgumentError: another device or dtype is asked for.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        own = self.device
        same = device is None or (device.type, device.index or 0) == (own.type, own.index or 0)
        return self if same and dtype in (None, self.dtype) else self._apply(None)

    def cpu(self) -> QuantizedTransformer:
        """Return the module itself; see ``to``."""
        return self.to("cpu")

    def float(self) -> QuantizedTransformer:
        """Return the module itself; see ``to``."""
        return self.to(torch.float32)

    def half(self) -> QuantizedTransformer:
        """Return the module itself; see ``to``."""
        return self.to(torch.float16)

    def bfloat16(self) -> QuantizedTransformer:
        """Return the module itself; see ``to``."""
        return self.to(torch.bfloat16)

    def _apply(self, fn: object, recurse: bool = True) -> NoReturn:
        """Refuse ``double``, ``cuda`` and similar methods, which all call this one."""
        raise ArgumentError(
            f"a quantized transformer stays on {self.device} and in {self.dtype}; lower it for another device, make it "
            "with as_diffusers_transformer(..., dtype=...) for another dtype, and move the pipeline's other components "
            f"(from_pipe: with transformer=pipe.transformer, torch_dtype={self.dtype})"
        )

    def train(self, mode: bool = True) -> QuantizedTransformer:
        """Return the module itself; raises ArgumentError for training mode."""
        if mode:
            self._refuse("has no training mode", TRAINING)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTransformer:
        """Return the module itself; raises ArgumentError if gradients are asked for."""
        if requires_grad:
            self._refuse("has no gradients", TRAINING)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: there are no gradients."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters of the float model; none of them is trainable."""
        return 0 if only_trainable else self._sizes[exclude_embeddings]

    def save_pretrained(self, save_directory: object, *args: object, **kwargs: object) -> NoReturn:
        """Raise ArgumentError, because diffusers could not read the result."""
        raise ArgumentError(
            "a lowered transformer is not saved with its pipeline; make a quantized module (to_module), which is, or "
            "save the quantized model with save_quantized and the pipeline with its transformer set to None"
        )


for _name in REFUSED:
    if hasattr(QuantizedTransformer, _name):  # other names are in no base class, so nothing finds them
        setattr(QuantizedTransformer, _name, refusing(_name))


def run_as(original: Any, captured: CallSignature, lowered: LoweredModel, *args: Any, **kwargs: Any) -> Any:
    """Run a lowered model on the arguments of ``original.forward``, and return what that would return.

    Raises:
        ArgumentError: the graph was not captured for this call.
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
    found = tree_leaves(lowered(*fit_inputs(lowered.inputs, tensors, lowered.sizes, binned=binned)))
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)
    outputs = [x.to(dtype=dtype) if x.is_floating_point() else x for x in found]
    if dtype is torch.float16:
        _warn_of_overflow(lowered, found, outputs)
    kind = output_class(type(original))
    if len(outputs) > len(fields(kind)):
        outputs = [outputs]  # these classes return a list of samples
    return kind(*outputs) if return_dict else tuple(outputs)


def _warn_of_overflow(lowered: LoweredModel, found: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Warn once for each lowered model whose output exceeds 65504, float16's largest number."""
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
    """The output class that ``forward`` of a diffusers model returns with ``return_dict=True``, found in its code."""
    forward = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    named = [forward.__globals__.get(name) for name in forward.__code__.co_names]
    return next((x for x in named if isinstance(x, type) and issubclass(x, BaseOutput)), Transformer2DModelOutput)
