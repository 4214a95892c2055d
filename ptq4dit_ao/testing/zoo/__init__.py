"""Tiny models of every diffusion transformer in diffusers, with random parameters and without any download."""

from ptq4dit_ao.testing.zoo import difficult, image, video  # noqa: F401  (they register their families)
from ptq4dit_ao.testing.zoo.family import FAMILIES, Family, iter_families

__all__ = ["FAMILIES", "Family", "iter_families"]
