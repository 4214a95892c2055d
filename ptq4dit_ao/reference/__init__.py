"""A real, small diffusion transformer to try everything on: trained on handwritten digits, shipped with its judge."""

from ptq4dit_ao.reference.models import SAMPLING, load_reference_classifier, load_reference_dit

__all__ = ["SAMPLING", "load_reference_classifier", "load_reference_dit"]
