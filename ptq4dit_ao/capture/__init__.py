"""Capture of a model as a graph: export, patches for certain models, and the call's signature."""

from ptq4dit_ao.capture.export import export_transformer

__all__ = ["export_transformer"]
