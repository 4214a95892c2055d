"""Analysis of exported graphs: names, shapes, and the scale propagation that finds the folds of balancing vectors."""

from ptq4dit_ao.graph.premultiply import premultiplied_sites
from ptq4dit_ao.graph.sites import (
    Consumer,
    CutEdit,
    NormEdit,
    ParameterEdit,
    ScalarEdit,
    Site,
    SitePolicy,
    find_sites,
    first_refusals,
    refuse_sites,
)

__all__ = [
    "Consumer",
    "CutEdit",
    "NormEdit",
    "ParameterEdit",
    "ScalarEdit",
    "Site",
    "SitePolicy",
    "find_sites",
    "first_refusals",
    "premultiplied_sites",
    "refuse_sites",
]
