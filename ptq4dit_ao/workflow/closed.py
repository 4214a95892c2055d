"""Refusals of a quantized transformer, with their reasons.

It computes one fixed graph. Functions of diffusers, accelerate and peft change a model through its methods, attributes
and blocks, which would not reach that graph. All three are closed here, so that such a change raises an error instead
of having no effect.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn

from ptq4dit_ao.errors import AbsentError, ArgumentError

HOOKS = (
    "it computes one fixed graph, which hooks, caches and offloading do not reach; leave them out, or make a quantized "
    "module, which they do reach (to_module)"
)
ATTENTION = (
    "attention is part of its graph; leave this out, call it on the float transformer and quantize that, or use "
    "to_module"
)
PLACE = (
    "its weights stay as and where its backend has them; leave it out, as with exclude_modules='transformer' of a "
    "pipeline's enable_group_offload, lower it to another backend, or make a quantized module (to_module)"
)
ADAPTERS = (
    "a graph has no layers for an adapter; load it on a quantized module (to_module), or fuse it into the float "
    "transformer (fuse_lora) and quantize that"
)
TRAINING = "it is for inference; train the float transformer and quantize it again"
WEIGHTS = (
    "its weights have the form of its backend; ask for its dtype and device, keep the quantized model with "
    "save_quantized, and leave it out of offloading; or make a quantized module (to_module), which has parameters"
)
LOADING = "read a quantized model with load_quantized, and make a transformer of it with as_diffusers_transformer"
BUILT = "it is built already; lower it to a backend that compiles ('x86_inductor', or 'cuda' on a GPU)"
STRUCTURE = "its graph is fixed; change the float transformer and quantize it again"
LOWERED = "make another quantized transformer with as_diffusers_transformer(lowered)"

_BY_REASON: dict[str, tuple[str, ...]] = {
    HOOKS: ("enable_cache", "disable_cache"),
    ATTENTION: (
        "attn_processors", "disable_forward_chunking", "enable_forward_chunking", "enable_npu_flash_attention",
        "enable_xformers_memory_efficient_attention", "enable_xla_flash_attention", "fuse_qkv_projections",
        "load_attn_procs", "reset_attention_backend", "save_attn_procs", "set_attention_backend",
        "set_attn_processor", "set_default_attn_processor", "set_use_memory_efficient_attention_xformers",
        "set_use_npu_flash_attention", "set_use_xla_flash_attention", "unfuse_qkv_projections",
    ),
    PLACE: (
        "enable_group_offload", "enable_layerwise_casting", "enable_parallelism", "share_memory", "to_empty", "type",
    ),
    ADAPTERS: (
        "active_adapters", "add_adapter", "delete_adapters", "disable_adapters", "disable_lora", "enable_adapters",
        "enable_lora", "enable_lora_hotswap", "fuse_lora", "load_lora_adapter", "save_lora_adapter", "set_adapter",
        "set_adapters", "unfuse_lora", "unload_lora",
    ),
    TRAINING: (
        "enable_gradient_checkpointing", "register_backward_hook", "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ),
    WEIGHTS: (
        "buffers", "dequantize", "get_buffer", "get_extra_state", "get_memory_footprint", "get_parameter",
        "load_state_dict", "named_buffers", "named_parameters", "parameters", "push_to_hub",
        "register_load_state_dict_post_hook", "register_load_state_dict_pre_hook", "register_state_dict_post_hook",
        "register_state_dict_pre_hook", "save_config", "set_extra_state", "state_dict", "to_json_file",
        "to_json_string",
    ),
    LOADING: ("from_config", "from_pretrained", "from_single_file", "register_for_auto_class"),
    BUILT: ("compile", "compile_repeated_blocks"),
    STRUCTURE: (
        "add_module", "apply", "register_buffer", "register_module", "register_parameter", "register_to_config",
        "set_submodule",
    ),
}  # fmt: skip

REFUSED = {name: reason for reason, names in _BY_REASON.items() for name in names}
"""Methods of diffusers' models -> the reason why a quantized transformer lacks them, and the way out."""

_ATTRIBUTES = {
    "_diffusers_hook": ("hook of diffusers (a cache, a guider, offloading, casting)", HOOKS),
    "_hf_hook": ("hook of accelerate", HOOKS),
    "_old_forward": ("hook of accelerate", HOOKS),
    "forward": ("other forward", HOOKS),
    "hf_device_map": ("device map", PLACE),
    "peft_config": ("adapter of peft", ADAPTERS),
    "lowered": ("other lowered model", LOWERED),
}
"""Attributes that other packages set on a model -> what they are, and the reason for refusing them."""


class Closed(nn.Module):
    """A module whose attributes cannot be changed."""

    def _refuse(self, what: str, reason: str, error: type[ArgumentError] = ArgumentError) -> NoReturn:
        raise error(f"a quantized transformer {what}: {reason}")

    def __setattr__(self, name: str, value: object) -> None:
        what, reason = _ATTRIBUTES.get(name, (f"value for {name!r}", STRUCTURE))
        self._refuse(f"takes no {what}", reason)

    def __delattr__(self, name: str) -> None:
        self._refuse(f"keeps its {name!r}", STRUCTURE)


def refusing(name: str) -> Callable[..., None]:
    """A method for a model or its class that raises ArgumentError."""

    def refuse(*args: object, **kwargs: object) -> None:
        if not _switches_off(name, args):
            raise ArgumentError(f"a quantized transformer has no {name}: {REFUSED[name]}")

    refuse.__doc__ = f"Raises ArgumentError: {REFUSED[name]}."
    return refuse


def _switches_off(name: str, args: tuple[object, ...]) -> bool:
    """Whether a call switches an option off, like ``set_use_...(False)``.

    Pipelines call these on all modules, and there is nothing to do.
    """
    return name.startswith("set_use_") and any(value is False for value in args)


# -- blocks and other parts --------------------------------------------------------------------------------------------

_READ = ("children", "eval", "extra_repr", "get_submodule", "modules", "named_children", "named_modules", "train")
"""Methods of ``nn.Module`` that a part keeps."""
_CONTAINER_READ = ("items", "keys", "values")
"""Methods of containers that a part keeps."""
_CONTAINER_WRITE = ("__delitem__", "__iadd__", "__imul__", "__setitem__")
"""Methods of containers that a part refuses."""


class Part(Closed):
    """A read-only submodule of the float model: its numbers, its lists, and the methods that need no weights."""

    def _refuse(self, what: str, reason: str, error: type[ArgumentError] = ArgumentError) -> NoReturn:
        path = self.__dict__["_path"]
        raise error(f"{path!r} of a quantized transformer {what}: the graph does not pass through it; {reason}")

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_dropped"]:
            self._refuse(f"has no {name!r}", WEIGHTS, AbsentError)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Return nothing, because the text of many modules needs their weights."""
        return ""

    def train(self, mode: bool = True) -> Part:
        """Return the part itself; raises ArgumentError for training mode."""
        if mode:
            self._refuse("takes no training mode", TRAINING)
        return self


def close_parts(model: nn.Module) -> None:
    """Make every submodule a :class:`Part`, in place, and remove its tensors."""
    parts = [(path, module, any(map(own_tensors, module.modules()))) for path, module in model.named_modules() if path]
    for path, module, weighs in parts:
        dropped = own_tensors(module)
        for name in dropped:
            delattr(module, name)
        module.__dict__.update(_path=path, _dropped=dropped)
        kind: Any = type(module)
        object.__setattr__(module, "__class__", _closed(kind, weighs))


def own_tensors(module: nn.Module) -> frozenset[str]:
    """Names of a module's own parameters, buffers and tensor attributes, without those of its submodules."""
    attributes = (name for name, value in vars(module).items() if isinstance(value, Tensor))
    return frozenset((*module._parameters, *module._buffers, *attributes))


@functools.cache
def _closed(kind: type[nn.Module], weighs: bool) -> type[Part]:
    """A subclass that refuses the changing methods of ``nn.Module`` and, if it had weights, all those of its class."""
    own = [base for base in kind.__mro__ if base is not nn.Module and issubclass(base, nn.Module)]
    methods = {name for base in own for name, value in vars(base).items() if inspect.isfunction(value)}
    names = {name for name in vars(nn.Module) if not name.startswith("_")} - {*_READ, "forward"}
    names |= {name for name in methods if weighs and not name.startswith("_")} - {*_READ, *_CONTAINER_READ}
    names |= methods & {*_CONTAINER_WRITE}
    body: dict[str, Any] = {name: _refusing_part(name) for name in names if callable(getattr(kind, name, None))}
    # Functions that look for blocks compare their class.
    body["__class__"] = property(lambda self: kind)
    return type(kind.__name__, (Part, kind), body)


def _refusing_part(name: str) -> Callable[..., None]:
    def refuse(self: Part, *args: object, **kwargs: object) -> None:
        if not _switches_off(name, args):
            self._refuse("cannot be called" if name == "forward" else f"has no {name}", REFUSED.get(name, STRUCTURE))

    return refuse
