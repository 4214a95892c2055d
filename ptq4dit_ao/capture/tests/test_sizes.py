"""Free sizes: expressions, the values that sizes may have, and their form in a file."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao import export_transformer, free_sizes
from ptq4dit_ao.capture.interface import InputSpec, bind_sizes, check_batch, fit_inputs, input_specs, resized, shape_at
from ptq4dit_ao.capture.sizes import FreeSize, FreeSizes, check_expression, evaluate, names_in
from ptq4dit_ao.errors import ArgumentError, ArtifactError, CalibrationError, ExportError

HEIGHT = FreeSize(name="height", example=8, least=2, most=64, multiple=2)
WIDTH = FreeSize(name="width", example=8, least=2, most=64, multiple=2)
SIZES = FreeSizes(
    sizes=(HEIGHT, WIDTH), conditions=("height <= 2 * width",), fixed={"text of prompt": "the model fixes it at 7"}
)


# -- expressions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (7, 7),
        ("height", 8),
        ("height // 2 * (width // 2)", 12),
        ("(-1) + height % 3", 1),
        ("max(height, width, 3) - min(2, width)", 6),
        ("height == 8 and width != 8 or height < 2", True),
        ("not height >= 8", False),
        ("height // (width - 6) == 2", False),  # nothing is divided by 0, and no size is like the result
    ],
)
def test_an_expression_has_a_value(expression, value):
    assert evaluate(expression, {"height": 8, "width": 6}) == value


def test_an_expression_names_sizes_and_not_functions():
    assert names_in("max(height, 2) + tokens") == {"height", "tokens"} and names_in(3) == set()


@pytest.mark.parametrize(
    "expression",
    [
        "height.real",
        "__import__('os')",
        "height ** 9",
        "[height]",
        "height if 1 else 2",
        "'a' * 9",
        "max()",
        "open(1)",
        "lambda: 1",
        "1.5",
        "depth",
        "height +",
        "height < width < 3",
        "(" * 300,
        -1,
        True,
        None,
        2.0,
    ],
)
def test_what_is_no_expression_of_sizes_is_refused(expression):
    with pytest.raises(ArtifactError, match=r"the size .* quantize again"):
        check_expression(expression, ["height", "width"])


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"height": 16, "width": 8}, None),
        ({"height": 9, "width": 8}, "height is 9, which is no multiple of 2"),
        ({"height": 0, "width": 8}, "height is 0, less than 2"),
        ({"height": 66, "width": 64}, "height is 66, more than 64"),
        ({"height": 18, "width": 8}, "height <= 2 * width does not hold at height 18, width 8"),
        ({"height": 18}, None),  # a condition on what is not known
    ],
)
def test_sizes_that_cannot_be_have_a_reason(values, problem):
    assert SIZES.problem(values) == problem


def test_other_sizes_are_permitted_and_differ():
    values, still = SIZES.other()
    assert values == {"height": 4, "width": 4} and still == [] and SIZES.problem(values) is None
    assert SIZES.other({"height": 2, "width": 2})[0] == {"height": 4, "width": 4}


def test_a_size_that_no_condition_lets_change_is_named():
    sizes = FreeSizes(sizes=(HEIGHT, WIDTH), conditions=("height == width",))
    assert sizes.other() == ({"height": 8, "width": 8}, ["height", "width"])


def test_sizes_say_what_they_may_be():
    assert str(HEIGHT) == "height: from 2 to 64, a multiple of 2"
    assert str(FreeSize(name="text", example=7)) == "text: from 1"


# -- files -------------------------------------------------------------------------------------------------------------


def test_sizes_come_back_from_json():
    assert FreeSizes.from_dict(json.loads(json.dumps(SIZES.to_dict()))) == SIZES


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": 3},
        {"sizes": [{"name": "height"}]},
        {"conditions": ["depth < 2"]},
        {"conditions": [1.5]},
        {"fixed": {"a": 1}},
        {"more": 0},
        {"sizes": [HEIGHT.__dict__ | {"multiple": 0}]},
        {"sizes": [HEIGHT.__dict__ | {"name": "a b"}]},
    ],
)
def test_sizes_that_cannot_be_read(change):
    with pytest.raises(ArtifactError, match="quantize again"):
        FreeSizes.from_dict({**SIZES.to_dict(), **change})


# -- a graph -----------------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """Patches of 2 x 2 with a table of 8 x 8 positions, as many ids as patches, and a text of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, stride=2)
        self.table = nn.Parameter(torch.randn(8, 8, 6))
        self.text = nn.Linear(5, 6)

    def forward(self, x: Tensor, ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        tokens = self.embed(x).flatten(2).mT + self.table[:height, :width].flatten(0, 1) + ids.sum(-1, keepdim=True)
        text = self.text(encoder_hidden_states) * encoder_attention_mask[..., None]
        return torch.cat([text, tokens], dim=1)


def call(rows: int = 3, height: int = 8, width: int = 12, text: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "x": torch.randn(rows, 3, height, width, generator=generator),
        "ids": torch.randn(height // 2 * (width // 2), 2, generator=generator),
        "encoder_hidden_states": torch.randn(rows, text, 5, generator=generator),
        "encoder_attention_mask": torch.ones(rows, text),
    }


@pytest.fixture(scope="module")
def patches():
    torch.manual_seed(0)
    model = Patches().eval()
    return model, export_transformer(model, call())


def test_the_free_sizes_of_a_graph(patches):
    _, graph = patches
    sizes = {size.name: size for size in free_sizes(graph).sizes}
    assert list(sizes) == ["batch", "height", "width", "text"]
    assert (sizes["height"].most, sizes["width"].most, sizes["text"].most) == (17, 17, None)  # half of 17 is 8
    shapes = {spec.name: spec.sizes for spec in input_specs(graph)}
    assert shapes["x"] == ("batch", 3, "height", "width")
    assert shapes["encoder_attention_mask"] == ("batch", "text")
    assert evaluate(shapes["ids"][0], {"height": 6, "width": 10}) == 15 and shapes["ids"][1] == 2


@pytest.mark.parametrize("sizes", [(1, 2, 2, 1), (2, 16, 16, 3), (5, 4, 14, 40)])
def test_a_graph_computes_what_the_model_does_at_any_size(patches, sizes):
    model, graph = patches
    assert torch.equal(graph(*call(*sizes).values()), model(**call(*sizes)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 18}, "the graph cannot take batch 1: height is 18, more than 17"),
        ({"ids": torch.zeros(5, 2)}, r"ids of batch 1 has shape \(5, 2\), .* with batch 3, height 8, width 12, text 7"),
        ({"encoder_attention_mask": torch.ones(3, 6)}, r"encoder_attention_mask of batch 1 has shape \(3, 6\)"),
    ],
)
def test_batches_of_other_sizes_are_refused_by_name(patches, change, message):
    sizes = {name: value for name, value in change.items() if isinstance(value, int)}
    batch = tuple((call(**sizes) | {n: x for n, x in change.items() if n not in sizes}).values())
    with pytest.raises(CalibrationError, match=message):
        check_batch(patches[1], batch, "batch 1")


def test_a_call_beyond_the_table_is_refused(patches):
    _, graph = patches
    specs, tensors = input_specs(graph), list(call(height=20).values())
    with pytest.raises(ArgumentError, match="height is 20, more than 17; give the pipeline a height and width"):
        fit_inputs(specs, tensors, free_sizes(graph))
    assert len(fit_inputs(specs, list(call(height=16).values()), free_sizes(graph))) == 4


def test_only_what_is_asked_for_is_free():
    torch.manual_seed(0)
    model = Patches().eval()
    graph = export_transformer(model, call(), dynamic=("batch", "text"))
    assert free_sizes(graph).names == ("batch", "text")
    with pytest.raises(ArgumentError, match="dynamic has 'hight'; the axes that can be free are 'batch', 'height'"):
        export_transformer(model, call(), dynamic=("hight",))


def test_a_size_that_the_model_fixes_has_a_reason():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(5, 1)

    graph = export_transformer(Fixed().eval(), (torch.zeros(2, 5, 3),))
    (reason,) = free_sizes(graph).fixed.values()
    assert list(free_sizes(graph).fixed) == ["tokens of x"] and "fixes it at 5" in reason
    with pytest.raises(ExportError, match=r"the tokens of x cannot be free: .* fixes it at 5; leave it out of dynamic"):
        export_transformer(Fixed().eval(), (torch.zeros(2, 5, 3),), dynamic=("batch", "tokens"))


def test_a_size_at_which_the_graph_would_be_wrong_is_not_free():
    class Recorded(nn.Module):
        """It adds a number that the export sees as a constant."""

        def forward(self, x: Tensor) -> Tensor:
            return x + float(str(x.shape[1])) if isinstance(x.shape[1], int) else x + 5.0

    graph = export_transformer(Recorded().eval(), (torch.zeros(2, 5, 3),))
    assert free_sizes(graph).names == ("batch",)
    assert "at tokens 3, output 0 differs by" in free_sizes(graph).fixed["tokens of x"]


def test_a_size_of_one_at_which_the_model_does_otherwise_is_not_free():
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 1:] if x.shape[1] > 1 else x

    class BranchesTogether(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 1:] if x.shape[2] * x.shape[3] > 1 else x

    def least(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
        graph = export_transformer(model.eval(), (torch.randn(shape),))
        return {size.name: size.least for size in free_sizes(graph).sizes}

    assert least(Branches(), (2, 6, 3)) == {"batch": 1, "tokens": 2}
    assert least(BranchesTogether(), (2, 3, 6, 6)) == {"batch": 1, "height": 2, "width": 2}
    assert least(nn.Identity(), (2, 6, 3)) == {"batch": 1, "tokens": 1}


def test_an_input_may_have_the_name_of_a_function_of_python():
    class Named(nn.Module):
        def forward(self, input: Tensor, type: Tensor) -> Tensor:
            return input + type

    example = (torch.zeros(2, 6, 3), torch.zeros(2, 6, 3))
    for inputs in (example, dict(zip(("input", "type"), example, strict=True))):
        graph = export_transformer(Named().eval(), inputs)
        assert free_sizes(graph).names == ("batch", "tokens")
        assert [spec.name for spec in input_specs(graph)] == ["input", "type"]


def test_inputs_are_bound_to_sizes_and_resized():
    spec = InputSpec(name="x", shape=(2, 4), dtype=torch.float32, sizes=("batch", "tokens + 1"))
    named = InputSpec(name="y", shape=(3,), dtype=torch.float32, sizes=("tokens",))
    assert bind_sizes([spec, named], [(5, 9), (8,)]) == {"batch": 5, "tokens": 8}
    assert shape_at(spec, {"batch": 5, "tokens": 8}) == (5, 9) and shape_at(spec, {}) == (2, 4)
    x = resized(torch.arange(8.0).reshape(2, 4), spec, {"batch": 3, "tokens": 1})
    assert x.tolist() == [[0, 1], [4, 5], [0, 1]]
