from __future__ import annotations

import pytest

from ptq4dit_ao.artifact.names import check_attribute_path, check_identifier
from ptq4dit_ao.errors import ArtifactError


@pytest.mark.parametrize("name", ["x", "_scale_0", "input", "linear_12"])
def test_identifiers_pass(name: str) -> None:
    assert check_identifier(name, "node") == name


@pytest.mark.parametrize("name", ["", "0a", "a.b", "a b", "x): import os #", "x\n", "ᵃ", "lambda", None, 1, ["x"]])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ArtifactError, match=r"node .* is not an identifier; rename it in the model"):
        check_identifier(name, "node")


@pytest.mark.parametrize("path", ["weight", "_frozen_param0", "blocks.0.attn-1.to_q.weight", "blocks.0.half_width"])
def test_paths_pass(path: str) -> None:
    assert check_attribute_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "a..b",
        "a.",
        'a")or(__import__("os").system("true',
        "a b",
        "a\n",
        "forward",
        "a.forward",
        "__class__.x",
        "graph",
        "_in_spec",
        "_parameters",
        "a._buffers",
        "training",
        None,
        3,
    ],
)
def test_other_paths_are_refused(path: object) -> None:
    with pytest.raises(ArtifactError, match=r"tensor name .* is not a dotted path of free attribute names .*; rename"):
        check_attribute_path(path)
