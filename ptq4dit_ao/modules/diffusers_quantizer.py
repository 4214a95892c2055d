"""Quantized modules of diffusers on disk: ``save_pretrained``, ``from_pretrained`` and the hub.

There are two formats, by ``quant_method`` in the module's configuration:

* ``torchao``: weights as torchao's ``Int8Tensor``, one byte each. diffusers and torchao read it without this package.
* ``ptq4dit``: weights of 4 bits packed, two to a byte. diffusers reads it if this package was imported.

Both carry the recipe and the report in the metadata of the safetensors file. This module imports diffusers, so it is
imported by functions only.
"""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin, TorchAoConfig
from diffusers.quantizers.torchao import TorchAoHfQuantizer
from safetensors import safe_open
from torch import Tensor, nn
from torchao.quantization import Int8StaticActivationInt8WeightConfig, MappingType, PerRow, PerTensor

from ptq4dit_ao.choices import MODULE_FORMATS, ModuleFormat
from ptq4dit_ao.errors import ArgumentError, ArtifactError, check_choice
from ptq4dit_ao.modules.card import model_card, stored_bytes
from ptq4dit_ao.modules.form import ADDED_BIAS, dtype_of, integer_weights
from ptq4dit_ao.modules.packing import PACKED_BITS, Stored, pack, unpack
from ptq4dit_ao.modules.saving import saved_whole, unbind
from ptq4dit_ao.modules.weight import DTYPES, StaticInt8Weight

logger = logging.getLogger(__name__)

METADATA = "ptq4dit"
"""Key of the recipe and the report in a safetensors file's metadata."""


FLOATS = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
"""Names of the dtypes that the layers of a quantized module may have."""


class Method(str, enum.Enum):  # noqa: UP042  (diffusers wants a str with a value)
    """``quant_method`` of this package."""

    PTQ4DIT = "ptq4dit"


class PTQ4DiTConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a module that was quantized and saved by this package.

    It describes a saved module, and cannot quantize one: that takes calibration.

    Args:
        linears: text on each quantized linear by name, such as ``w4a8 3d balanced bias``: bits, axes of its input,
            whether that is balanced, and whether there is a bias.
        dtype: dtype of the other layers.
        version: version of the format.
    """

    VERSION = 1

    def __init__(
        self,
        linears: Mapping[str, str | Stored] | None = None,
        dtype: str = "float32",
        version: int = VERSION,
        **unknown: object,
    ) -> None:
        self.quant_method: Any = Method.PTQ4DIT
        unknown.pop("quant_method", None)
        if unknown or version != self.VERSION:
            what = f"the key {sorted(unknown)[0]!r}" if unknown else f"version {version!r}"
            raise ArtifactError(
                f"quantization_config has {what}, which this version of ptq4dit-ao does not know; install the version "
                "that saved the module, or save it again"
            )
        if dtype not in FLOATS or not isinstance(linears or {}, Mapping):
            what = f"the dtype {dtype!r}" if dtype not in FLOATS else "linears that are no dict"
            raise ArtifactError(f"quantization_config has {what}; it is damaged, save the module again")
        self.linears = {name: Stored.of(name, entry) for name, entry in (linears or {}).items()}
        self.dtype = dtype
        self.version = version

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return {
            "quant_method": self.quant_method.value,
            "version": self.version,
            "dtype": self.dtype,
            "linears": {name: stored.to_text() for name, stored in self.linears.items()},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; diffusers prints them."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what :meth:`to_dict` has written."""
        return cls(**config_dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record of a module's quantization: its recipe and its report."""

    recipe: dict[str, Any]
    report: dict[str, Any]

    @classmethod
    def of(cls, recipe: Mapping[str, Any], report: Mapping[str, Any]) -> Record:
        """The record of a recipe and a report, as it will be read again."""
        return cls(**json.loads(json.dumps({"recipe": recipe, "report": report})))

    def to_metadata(self) -> dict[str, str]:
        """The record as metadata of a safetensors file."""
        return {METADATA: json.dumps({"recipe": self.recipe, "report": self.report})}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> Record | None:
        """Read the record in the metadata of a safetensors file; None if there is none.

        Raises:
            ArtifactError: it is damaged.
        """
        if METADATA not in metadata:
            return None
        try:
            found = json.loads(metadata[METADATA])
        except ValueError:
            found = None
        match found:
            case {"recipe": dict(recipe), "report": dict(report), **rest} if not rest:
                return cls(recipe=recipe, report=report)
        raise ArtifactError("the record of the module's quantization is damaged; copy or save the module again")

    @classmethod
    def of_files(cls, files: Sequence[str]) -> Record:
        """Read the record of a saved module."""
        for file in files:
            with safe_open(file, framework="pt") as opened:
                found = cls.of_metadata(opened.metadata() or {})
            if found is not None:
                return found
        raise ArtifactError(f"{files[0] if files else 'the module'} has no record of its quantization; save it again")


class _Records:
    """Part of both quantizers: the record, the model card, and saving as a whole."""

    record: Record
    quantization_config: Any

    def with_record(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of the safetensors files."""
        return {**metadata, **self.record.to_metadata()}

    def card(self, module: Any, folder: Path) -> str:
        """Text of the model card for a module saved in ``folder``."""
        return model_card(module, self.record.recipe, self.record.report, stored_bytes(folder))


class PTQ4DiTHfQuantizer(_Records, DiffusersQuantizer):
    """diffusers' quantizer for the format ``ptq4dit``. It loads and saves; it does not quantize."""

    requires_calibration = True
    required_packages = ("torchao",)  # type: ignore[assignment]
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False

    def __init__(self, quantization_config: PTQ4DiTConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ArgumentError(
                "PTQ4DiT needs calibration samples, so from_pretrained cannot quantize a float model; load it without "
                "quantization_config, record samples with collect_from_pipeline, quantize it with apply_recipe, and "
                "make a module of it with to_module"
            )
        super().__init__(quantization_config, **kwargs)
        self._parts: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype asked for, or that in which the module was saved."""
        return getattr(torch, self.quantization_config.dtype) if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Names of the parameters that stored names stand for."""
        self.record = Record.of_files(checkpoint_files)
        known = self.quantization_config.linears
        weights = {f"{name}.weight.{part}": f"{name}.weight" for name, stored in known.items() for part in stored.parts}
        missing = sorted(name for name in weights if name not in loaded_keys and not name.endswith("pre_scale"))
        if missing:
            raise ArtifactError(f"{checkpoint_files[0]} lacks {missing[0]!r}; copy or save the module again")
        return list(dict.fromkeys(weights.get(key, key) for key in loaded_keys))

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Parameters from a file's tensors. Parts of a weight may be in several files."""
        found: dict[str, Any] = {}
        parts = self._parts
        for name, tensor in state_dict.items():
            layer, dot, _ = name.rpartition(".weight.")
            (parts if dot and layer in self.quantization_config.linears else found)[name] = tensor
        for layer, stored in self.quantization_config.linears.items():
            mine = {part: parts[key] for part in stored.parts if (key := f"{layer}.weight.{part}") in parts}
            if len(mine) == len(stored.parts):
                found[f"{layer}.weight"] = unpack(layer, stored, mine, self._shapes[layer])
                for part in mine:
                    del parts[f"{layer}.weight.{part}"]
        return found

    @property
    def supports_parallel_loading(self) -> bool:
        """False, because parts of a weight may be in several files."""
        return False

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors and metadata of the module's files."""
        _check_safe(safe_serialization)
        stored: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            if isinstance(tensor, StaticInt8Weight):
                stored |= {f"{name}.{part}": value for part, value in pack(tensor).items()}
            else:
                stored[name] = tensor
        return stored, self.with_record({})

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a parameter is an integer weight."""
        return isinstance(param_value, StaticInt8Weight)

    def create_quantized_param(  # type: ignore[override]  # as all others do
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Put an integer weight into the module."""
        layer, _, name = param_name.rpartition(".")
        weight = param_value.to(target_device)
        model.get_submodule(layer)._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, stored in self.quantization_config.linears.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise ArtifactError(
                    f"{type(model).__name__} has no linear {name!r}, which the saved module has; it belongs to another "
                    "configuration, or to another version of diffusers"
                )
            self._shapes[name] = linear.weight.shape
            if stored.bias and linear.bias is None:  # rounding has added one
                linear.bias = nn.Parameter(torch.empty(linear.out_features, device="meta"), requires_grad=False)
                setattr(linear, ADDED_BIAS, True)
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._parts:
            raise ArtifactError(f"the files of the module end within {sorted(self._parts)[0]!r}; copy them again")
        model.requires_grad_(False)
        saved_whole(model)
        return model

    def _dequantize(self, model: Any) -> Any:
        return _float_again(model)


class StockHfQuantizer(_Records, TorchAoHfQuantizer):
    """diffusers' quantizer of torchao's tensors, for a module of this package that it will read without it."""

    def __init__(self, quantization_config: TorchAoConfig, record: Record) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        self.offload = False
        self.record = record

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors and metadata of the module's files."""
        _check_safe(safe_serialization)
        plain = {
            name: tensor.as_int8_tensor() if isinstance(tensor, StaticInt8Weight) else tensor
            for name, tensor in state_dict.items()
        }
        tensors, metadata = super().get_state_dict_and_metadata(plain, safe_serialization)
        return tensors, self.with_record(metadata)

    def _dequantize(self, model: Any) -> Any:
        return _float_again(model)


def attach(module: Any, record: Record, method: ModuleFormat | None = None) -> None:
    """Make a quantized module of diffusers one that diffusers knows to be quantized, and can save.

    Args:
        module: the module, changed in place.
        record: what it knows of its quantization.
        method: format in which it is saved; None for ``torchao`` if that can hold it and saves nothing less, else
            ``ptq4dit``.

    Raises:
        ArgumentError: the format cannot hold the module.
    """
    if method is not None:
        check_choice("method", method, MODULE_FORMATS)
    weights = integer_weights(module)
    refusal = next((f"{name}: {why}" for name, why in _not_stock(module, weights)), None)
    if method is None:
        method = "ptq4dit" if refusal or any(w.stored_bits <= PACKED_BITS for w in weights.values()) else "torchao"
    if method == "torchao" and refusal is not None:
        raise ArgumentError(f"method 'torchao' cannot hold {refusal}; use method 'ptq4dit'")
    quantizer: Any
    if method == "torchao":
        quant_type = Int8StaticActivationInt8WeightConfig(
            granularity=[PerTensor(), PerRow()], act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False
        )
        quantizer = StockHfQuantizer(TorchAoConfig(quant_type), record)
    else:
        linears = {
            name: Stored(
                bits=weight.bits,
                x_bits=weight.x_bits,
                expansion=weight.expansion,
                dynamic=weight.dynamic,
                x_ndim=weight.x_ndim,
                balanced=weight.pre_scale is not None,
                centred=weight.pre_offset is not None,
                bias=module.get_submodule(name).bias is not None,
            )
            for name, weight in weights.items()
        }
        dtype = str(dtype_of(module)).removeprefix("torch.")
        quantizer = PTQ4DiTHfQuantizer(PTQ4DiTConfig(linears, dtype))
        quantizer.record = record
    module.hf_quantizer, module.is_quantized = quantizer, True
    module.quantization_method = quantizer.quantization_config.quant_method
    module.register_to_config(quantization_config=quantizer.quantization_config)
    saved_whole(module)


def _not_stock(module: nn.Module, weights: Mapping[str, StaticInt8Weight]) -> list[tuple[str, str]]:
    """Linears that torchao's format cannot hold, with the reason."""
    found = [(name, why) for name, weight in weights.items() if (why := weight.not_stock()) is not None]
    return found + [
        (name, "rounding has added a bias, which the model's class does not have")
        for name in weights
        if getattr(module.get_submodule(name), ADDED_BIAS, False)
    ]


def _check_safe(safe_serialization: bool) -> None:
    if not safe_serialization:
        raise ArgumentError("a quantized module is saved as safetensors only; leave safe_serialization on")


def _float_again(module: Any) -> Any:
    """A module with float weights, that diffusers saves as any other."""
    for name, weight in integer_weights(module).items():
        linear = module.get_submodule(name)
        linear.weight = nn.Parameter(weight.float_weight(), requires_grad=False)
        if (bias := weight.float_bias(linear.bias)) is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        vars(linear).pop(ADDED_BIAS, None)
    unbind(module)
    kept = {name: value for name, value in module.config.items() if name != "quantization_config"}
    module._internal_dict = FrozenDict(kept)
    return module
