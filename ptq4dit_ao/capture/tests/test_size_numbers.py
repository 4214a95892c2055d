"""Numbers of a call that are sizes are free in the graph as axes are, and called as such."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.axes import number_kind
from ptq4dit_ao.capture.export import call_like
from ptq4dit_ao.capture.interface import bind_sizes, free_sizes, input_specs
from ptq4dit_ao.capture.patches import exportable
from ptq4dit_ao.capture.signature import CallSignature, NumberName, TensorName, flatten_call, tensors_like
from ptq4dit_ao.errors import ArgumentError, ExportError
from ptq4dit_ao.testing.zoo import FAMILIES

ROWS = 4
"""As many rows as the examples' heights, widths and frames, which must not be taken for the batch."""


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- families ----------------------------------------------------------------------------------------------------------


def ltx(frames: int, height: int, width: int) -> dict[str, Any]:
    tokens = noise(ROWS, frames * height * width, 8)
    return {"hidden_states": tokens, "num_frames": frames, "height": height, "width": width}


def ltx2(frames: int, height: int, width: int) -> dict[str, Any]:
    rope = FAMILIES["ltx2"].model().rope
    coordinates = rope.prepare_video_coords(ROWS, frames, height, width, torch.device("cpu"), fps=24.0)
    return {**ltx(frames, height, width), "video_coords": coordinates}


def qwen(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"hidden_states": noise(ROWS, height * width, 16), "img_shapes": [[(1, height, width)]] * ROWS}


def nucleus(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"hidden_states": noise(ROWS, height * width, 16), "img_shapes": [(1, height, width)] * ROWS}


CASES = [
    ("ltx", ltx, ["frames", "height", "width"]),
    ("qwenimage", qwen, ["height", "width"]),
    slow("nucleusmoe_image", nucleus, ["height", "width"]),
    slow("ltx2", ltx2, ["frames", "height", "width", "audio_num_frames"]),
    slow("ltx23", ltx2, ["frames", "height", "width", "audio_num_frames"]),
]


@pytest.mark.parametrize(("name", "sized", "free"), CASES)
def test_the_graph_is_the_model_at_other_numbers(name, sized, free):
    model, example = FAMILIES[name].model(), FAMILIES[name].inputs(ROWS)
    graph = export_transformer(model, {**example, **sized(4, 4, 4)})
    sizes, specs = free_sizes(graph), input_specs(graph)
    assert specs is not None and {"batch", *free} <= set(sizes.names)
    signature, _ = flatten_call(model, {**example, **sized(4, 4, 4)})
    assert [(spec.name, spec.sizes) for spec in specs[-len(free) :]] == [
        (name, (size,)) for name, size in zip(signature.numbers, free, strict=True)
    ]
    for frames, height, width in [(4, 4, 4), (2, 6, 3), (3, 2, 9)]:
        call = {**example, **sized(frames, height, width)}
        tensors = tensors_like(signature, model, call)
        assert sizes.problem(bind_sizes(specs, [x.shape for x in tensors])) is None
        for one, other in zip(tree_leaves(model(**call)), tree_leaves(graph(*tensors)), strict=True):
            torch.testing.assert_close(one, other)
        expected = tree_leaves(call_like(graph, model, tensors))
        assert all(map(torch.equal, tree_leaves(model(**call)), expected))


@pytest.mark.parametrize(("scale_rope", "layered"), [(True, False), (False, False), (True, True), (False, True)])
def test_positions_of_several_images(scale_rope, layered):
    """Those of the original, whichever side is the largest; a layered image ends with its condition."""
    from diffusers.models.transformers import transformer_qwenimage as module

    kind = module.QwenEmbedLayer3DRope if layered else module.QwenEmbedRope

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rope = kind(10000, [4, 6, 6], scale_rope=scale_rope)

        def forward(self, x: Tensor, img_shapes: Any) -> tuple[Tensor, ...]:
            image, text = self.rope(video_fhw=img_shapes, max_txt_seq_len=7, device=x.device)
            return torch.view_as_real(image), torch.view_as_real(text)

    model, x = Positions().eval(), torch.zeros(2, 3)
    signature, tensors = flatten_call(model, {"x": x, "img_shapes": [[(2, 4, 6), (1, 8, 4)]]})
    free = tuple({0: torch.export.Dim.AUTO} if name in signature.numbers else None for name in tensors)

    class Flat(nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return model(**signature.bind(tensors))

    with exportable(model):
        program = torch.export.export(Flat(), tuple(tensors.values()), dynamic_shapes=(free,), strict=False)
    graph = program.module(check_guards=False)
    for shapes in ([(2, 4, 6), (1, 8, 4)], [(3, 5, 3), (1, 2, 11)], [(2, 9, 2), (1, 3, 4)]):
        given = tensors_like(signature, model, {"x": x, "img_shapes": [shapes]})
        for one, other in zip(model(x, [shapes]), graph(*given), strict=True):
            assert torch.equal(one, other)


# -- models that do something else with a number -----------------------------------------------------------------------


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def scale(self, height: int, width: int) -> Any:
        return 1.0

    def forward(self, tokens: Tensor, height: int = 4, width: int = 4, scale: int = 1) -> Tensor:
        x = self.linear(tokens.unflatten(1, (height, width)))
        return (x * self.scale(height, width) * scale).flatten(1, 2)


def called(height: int, width: int, **other: int) -> dict[str, Any]:
    return {"tokens": noise(3, height * width, 8), "height": height, "width": width, **other}


def test_a_choice_of_the_larger_number_is_a_condition():
    class Larger(Sized):
        def scale(self, height: int, width: int) -> Any:
            return torch.full((1,), max(height, width, 0))  # of two, torch takes a symbol

    model = Larger().eval()
    graph = export_transformer(model, called(8, 4))
    sizes = free_sizes(graph)
    assert sizes.problem({"batch": 3, "height": 9, "width": 4}) is None
    assert "width <= height" in str(sizes.problem({"batch": 3, "height": 4, "width": 9}))


def test_a_number_that_the_model_looks_up_is_fixed_and_other_sizes_are_free():
    class LooksUp(Sized):
        def forward(self, tokens: Tensor, height: int = 4, width: int = 4, scale: int = 1) -> Tensor:
            return self.linear(tokens) * {4: 1.0, 6: 2.0}[height]

    model = LooksUp().eval()
    sizes = free_sizes(export_transformer(model, called(4, 6)))
    assert "tokens" in sizes.names and "height" not in sizes.names
    assert "unhashable" in sizes.fixed["height of height"] or "fixes it" in sizes.fixed["height of height"]
    with pytest.raises(ExportError, match="the height of height cannot be free: .*leave it out of dynamic"):
        export_transformer(model, called(4, 6), dynamic=["height"])


def test_other_numbers_are_constants():
    model = Sized().eval()
    signature, tensors = flatten_call(model, called(4, 6, scale=3))
    assert list(tensors) == signature.names == ["tokens", "height", "width"] and signature.numbers == [
        "height",
        "width",
    ]
    assert signature.arguments["scale"] == 3
    with pytest.raises(ArgumentError, match="argument 'scale' of Sized is 2, but the graph was captured with 3"):
        tensors_like(signature, model, called(4, 6, scale=2))
    single, _ = flatten_call(model, called(1, 6))
    assert single.numbers == ["width"] and single.arguments["height"] == 1


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("height", "height"),
        ("num_frames", "frames"),
        ("num_frames_", "frames"),
        ("img_shapes_0_0_0", "frames"),
        ("img_shapes_0_0_2", "width"),
        ("img_shapes_0_2_1", "height"),
        ("img_shapes_0_0_3", None),
        ("img_shapes", None),
        ("height_0", None),
        ("sizes_height", None),
        ("rope_interpolation_scale_1", None),
    ],
)
def test_what_numbers_mean(path, kind):
    assert number_kind(path) == kind


# -- signatures --------------------------------------------------------------------------------------------------------


class Shapes(nn.Module):
    def forward(self, x: Tensor, img_shapes: Any = None, height: Any = None) -> Tensor:
        return x


def test_a_call_with_numbers_comes_back():
    call = {"img_shapes": [[(1, 4, 6), (1, 4, 6)]], "x": torch.ones(2), "height": 5}
    signature, tensors = flatten_call(Shapes(), call)
    assert list(tensors) == signature.names
    assert signature.names == ["x", *(f"img_shapes_0_{i}_{j}" for i in (0, 1) for j in (1, 2)), "height"]
    assert [len(tensors[name]) for name in signature.numbers] == [4, 6, 4, 6, 5]
    assert signature.bind(list(tensors.values())) == call
    again = CallSignature.from_json(json.loads(json.dumps(signature.to_json())))
    assert again == signature and again.to_json()["height"] == {"size": "height"}


def test_what_stands_for_a_number_is_where_the_tensors_are():
    _, tensors = flatten_call(Shapes(), {"height": 4, "x": torch.zeros(2, device="meta")})
    assert [x.device.type for x in tensors.values()] == ["meta", "meta"]


def test_a_tensor_of_the_same_name_stays_apart():
    class Both(nn.Module):
        def forward(self, x: Any, img_shapes: Any) -> Tensor:
            return x

    call = {"x": torch.ones(2), "img_shapes": [[torch.ones(3), 4, 5]]}
    signature, tensors = flatten_call(Both(), call)
    assert signature.arguments["img_shapes"] == [[TensorName("img_shapes_0_0"), *map(NumberName, _names(1, 2))]]
    assert signature.bind(list(tensors.values()))["img_shapes"][0][1:] == [4, 5]


def _names(*places: int) -> list[str]:
    return [f"img_shapes_0_{place}" for place in places]


@pytest.mark.parametrize("shape", [[(1, 4, 6)], (1, 4, 6)])
def test_equal_shapes_of_all_samples_are_given_once(shape):
    signature, _ = flatten_call(Shapes(), {"x": torch.ones(3), "img_shapes": [shape] * 3})
    for rows in (1, 2, 3):
        other = tree_map(lambda size: size if size == 1 else size + 1, shape)
        call = {"x": torch.ones(rows), "img_shapes": [other] * rows}
        assert [len(x) for x in tensors_like(signature, Shapes(), call)] == [rows, 5, 7]
    assert signature.bind([torch.ones(3), torch.ones(4), torch.ones(6)])["img_shapes"] == [shape]


def test_shapes_that_differ_are_kept():
    signature, _ = flatten_call(Shapes(), {"x": torch.ones(2), "img_shapes": [[(1, 4, 6)], [(1, 6, 4)]]})
    assert len(signature.numbers) == 4


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({"height": 4}, {"height": None}, "'height' of Shapes is None, but the graph was captured with a size"),
        ({"height": 4}, {"height": 4.5}, r"'height' of Shapes is 4\.5, but the graph was captured with a size"),
        ({"height": 4}, {"height": -4}, "'height' of Shapes is -4, but the graph was captured with a size"),
        ({"height": 4}, {"height": True}, "'height' of Shapes is True, but the graph was captured with a size"),
        ({"height": None}, {"height": 4}, "'height' of Shapes is 4, but the graph was captured with None"),
        ({"height": 1}, {"height": 4}, "'height' of Shapes is 4, but the graph was captured with 1"),
        ({"img_shapes": [[(1, 4, 6)]]}, {"img_shapes": [[(2, 4, 6)]]}, r"'img_shapes' of Shapes is \[\[\(2, a size"),
        ({"img_shapes": [[(1, 4, 6)]]}, {"img_shapes": [[(1, 4, 6)] * 2]}, "'img_shapes' of Shapes is .*captured with"),
    ],
)
def test_calls_that_the_graph_does_not_compute(then, now, message):
    signature, _ = flatten_call(Shapes(), {"x": torch.zeros(1), **then})
    with pytest.raises(ArgumentError, match=message):
        tensors_like(signature, Shapes(), {"x": torch.zeros(1), **now})


def test_a_size_of_one_is_a_size_in_a_later_call():
    signature, _ = flatten_call(Shapes(), {"x": torch.zeros(1), "height": 4})
    assert len(tensors_like(signature, Shapes(), {"x": torch.zeros(1), "height": 1})[1]) == 1


def test_a_signature_of_an_earlier_version_takes_numbers_as_they_were():
    before = CallSignature.from_json({"x": {"tensor": "x"}, "height": 4})
    assert before.names == ["x"] and before.bind([torch.ones(1)])["height"] == 4
    assert len(tensors_like(before, Shapes(), {"x": torch.zeros(1), "height": 4})) == 1
    with pytest.raises(ArgumentError, match="'height' of Shapes is 8, but the graph was captured with 4"):
        tensors_like(before, Shapes(), {"x": torch.zeros(1), "height": 8})
