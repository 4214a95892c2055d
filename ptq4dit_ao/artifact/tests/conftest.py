from __future__ import annotations

import copy

import pytest
from torch.fx import GraphModule

from ptq4dit_ao.artifact.tests import models


@pytest.fixture(scope="session")
def dits() -> dict[str, GraphModule]:
    """One tiny DiT: as exported, with int8 weights and activations, with int4 weights."""
    exported = models.export_dit()
    return {
        "float": exported.module(check_guards=False),
        "int8": models.quantize_int8(exported.module(check_guards=False)),
        "int4": models.quantize_int4(exported.module(check_guards=False)),
    }


@pytest.fixture(scope="session")
def exported_small() -> GraphModule:
    return models.export_small()


@pytest.fixture
def small(exported_small: GraphModule) -> GraphModule:
    """A copy that the test may change."""
    return copy.deepcopy(exported_small)
