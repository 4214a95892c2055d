"""Reference models: small trained diffusion transformers of grey images, shipped with classifiers that judge them."""

from ptq4dit_ao.reference.models import (
    DIGITS,
    FASHION,
    FLOW,
    REFERENCES,
    SAMPLING,
    Reference,
    load_reference_classifier,
    load_reference_dit,
)

__all__ = [
    "DIGITS",
    "FASHION",
    "FLOW",
    "REFERENCES",
    "SAMPLING",
    "Reference",
    "load_reference_classifier",
    "load_reference_dit",
]
