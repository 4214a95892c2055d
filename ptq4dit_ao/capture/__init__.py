"""Capture of a model as a graph: export, patches for certain models, free sizes, and the call's signature."""

from ptq4dit_ao.capture.export import export_transformer
from ptq4dit_ao.capture.interface import free_sizes

__all__ = ["export_transformer", "free_sizes"]
