"""Post-training quantization of Diffusion Transformers, as a plugin for torchao PT2E and NNCF.

Names are imported at their first use, so that ``import ptq4dit_ao`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ptq4dit_ao._version import __version__ as __version__
from ptq4dit_ao.modules.registration import register

if TYPE_CHECKING:
    from ptq4dit_ao.calibration import CalibrationSamples, collect_components, collect_from_pipeline
    from ptq4dit_ao.capture import export_transformer, free_sizes
    from ptq4dit_ao.errors import PTQ4DiTError
    from ptq4dit_ao.graph import SitePolicy, find_sites
    from ptq4dit_ao.lowering import available_backends, lower
    from ptq4dit_ao.modules.form import as_fast_module, prove_kernels
    from ptq4dit_ao.observers import SalienceStatistics
    from ptq4dit_ao.passes import BalanceSettings, balance, balance_module, balance_result, collect_salience
    from ptq4dit_ao.quantizer import (
        Expansion,
        Override,
        PTQ4DiTQuantizer,
        distill,
        round_sequentially,
        salience_statistics,
    )
    from ptq4dit_ao.recipe import Recipe, load_recipe, recipe_json_schema
    from ptq4dit_ao.reference import load_reference_classifier, load_reference_dit
    from ptq4dit_ao.workflow import (
        QuantizedModel,
        apply_recipe,
        as_diffusers_transformer,
        choose_weight_bits,
        load_quantized,
        quantize_pipeline,
        save_quantized,
        to_module,
    )


_HOMES = {
    "calibration": ("CalibrationSamples", "collect_components", "collect_from_pipeline"),
    "errors": ("PTQ4DiTError",),
    "capture": ("export_transformer", "free_sizes"),
    "graph": ("SitePolicy", "find_sites"),
    "lowering": ("available_backends", "lower"),
    "modules.form": ("as_fast_module", "prove_kernels"),
    "observers": ("SalienceStatistics",),
    "passes": ("BalanceSettings", "balance", "balance_module", "balance_result", "collect_salience"),
    "quantizer": (
        "Expansion",
        "Override",
        "PTQ4DiTQuantizer",
        "distill",
        "round_sequentially",
        "salience_statistics",
    ),
    "recipe": ("Recipe", "load_recipe", "recipe_json_schema"),
    "reference": ("load_reference_classifier", "load_reference_dit"),
    "workflow": (
        "QuantizedModel",
        "apply_recipe",
        "as_diffusers_transformer",
        "choose_weight_bits",
        "load_quantized",
        "quantize_pipeline",
        "save_quantized",
        "to_module",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BalanceSettings",
    "CalibrationSamples",
    "Expansion",
    "Override",
    "PTQ4DiTError",
    "PTQ4DiTQuantizer",
    "QuantizedModel",
    "Recipe",
    "SalienceStatistics",
    "SitePolicy",
    "apply_recipe",
    "as_diffusers_transformer",
    "as_fast_module",
    "available_backends",
    "balance",
    "balance_module",
    "balance_result",
    "choose_weight_bits",
    "collect_components",
    "collect_from_pipeline",
    "collect_salience",
    "distill",
    "export_transformer",
    "find_sites",
    "free_sizes",
    "load_quantized",
    "load_recipe",
    "load_reference_classifier",
    "load_reference_dit",
    "lower",
    "prove_kernels",
    "quantize_pipeline",
    "recipe_json_schema",
    "round_sequentially",
    "salience_statistics",
    "save_quantized",
    "to_module",
]

register()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
