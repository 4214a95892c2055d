"""Workflows from a recipe to an artifact: load a model, calibrate, quantize, evaluate, save and load."""

from ptq4dit_ao.workflow.apply import apply_recipe
from ptq4dit_ao.workflow.as_diffusers import as_diffusers_transformer
from ptq4dit_ao.workflow.checkpoint import balance_checkpoint
from ptq4dit_ao.workflow.from_recipe import quantizer_from_recipe
from ptq4dit_ao.workflow.main_job import quantize
from ptq4dit_ao.workflow.models import LoadedModel, load_model
from ptq4dit_ao.workflow.module_form import to_module
from ptq4dit_ao.workflow.pipeline import quantize_pipeline
from ptq4dit_ao.workflow.quantized_model import QuantizedModel, load_quantized, save_quantized
from ptq4dit_ao.workflow.weight_bits import WeightBits, choose_weight_bits

__all__ = [
    "LoadedModel",
    "QuantizedModel",
    "WeightBits",
    "apply_recipe",
    "as_diffusers_transformer",
    "balance_checkpoint",
    "choose_weight_bits",
    "load_model",
    "load_quantized",
    "quantize",
    "quantize_pipeline",
    "quantizer_from_recipe",
    "save_quantized",
    "to_module",
]
