"""How a graph is got from a model: export, patches for models by name, the call's signature."""

from ptq4dit_ao.capture.export import export_transformer

__all__ = ["export_transformer"]
