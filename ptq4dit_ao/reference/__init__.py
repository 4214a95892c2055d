"""Real, small diffusion transformers to try everything on: trained on grey images, shipped with their judges."""

from ptq4dit_ao.reference.models import (
    DIGITS,
    FASHION,
    REFERENCES,
    SAMPLING,
    Reference,
    load_reference_classifier,
    load_reference_dit,
)

__all__ = [
    "DIGITS",
    "FASHION",
    "REFERENCES",
    "SAMPLING",
    "Reference",
    "load_reference_classifier",
    "load_reference_dit",
]
