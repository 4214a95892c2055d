"""What replaces uncapturable parts of diffusers computes the same, masks what is masked, and goes away again."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.export import call_like
from ptq4dit_ao.capture.interface import IMAGE_MASK, free_sizes, input_specs, resized
from ptq4dit_ao.capture.patches import PATCHES, exportable
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.capture.size_patches import linspace
from ptq4dit_ao.errors import ExportError
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.testing.zoo.draw import noise

QUICK = ["lumina2", "lumina_next", "omnigen"]
SLOW = ["chroma", "cosmos", "mochi", "hidream", "hunyuan_video15", "hunyuan_video_framepack", "wan_animate"]
ALL = [*QUICK, *SLOW]
MASKS = {
    "lumina2": ("encoder_attention_mask", "encoder_hidden_states"),
    "lumina_next": ("encoder_mask", "encoder_hidden_states"),
    "mochi": ("encoder_attention_mask", "encoder_hidden_states"),
    "hunyuan_video15": ("encoder_attention_mask", "encoder_hidden_states"),
    "hunyuan_video_framepack": ("encoder_attention_mask", "encoder_hidden_states"),
}
TOLERANCE = 1e-5
SIZES: dict[str, list[dict[str, int]]] = {
    "bria_fibo2": [{"batch": 2, "height": 4, "width": 16}, {"height": 10, "width": 6}],
    "chronoedit": [{"frames": 5, "height": 4, "width": 10}, {"batch": 2, "frames": 1, "text": 520}],
    "cogvideox": [{"frames": 3, "height": 4, "width": 10}, {"batch": 2, "frames": 7, "width": 12}],
    "cosmos": [{"frames": 3, "height": 4, "width": 10, "text": 5}, {"batch": 2, "frames": 8, "width": 16}],
    "dit": [{"height": 4}, {"batch": 2, "height": 14}],
    "easyanimate": [{"frames": 3, "height": 4, "width": 10, "text": 5}, {"batch": 2, "height": 18, "width": 2}],
    "helios": [
        {"frames": 3, "height": 4, "width": 10, "text": 5},
        {"batch": 2, "latents_history_short_axis_3": 6, "latents_history_short_axis_4": 4},
    ],
    "joyimage": [{"height": 4, "width": 10, "text": 5}, {"batch": 2, "height": 14, "width": 6, "text": 9}],
    "kandinsky5": [{"frames": 3, "height": 4, "width": 10, "text": 5}, {"batch": 2, "frames": 1, "width": 12}],
    "kandinsky6": [{"frames": 3, "height": 4, "width": 10, "text": 5}, {"batch": 2, "frames": 1, "width": 12}],
    "krea2": [{"tokens": 9, "text": 5}, {"batch": 2, "tokens": 20, "text": 11}],
    "latte": [{"height": 4, "width": 10, "text": 5}, {"batch": 2, "height": 14, "width": 6}],
    "mochi": [{"frames": 3, "height": 4, "width": 10, "text": 5}, {"batch": 2, "height": 14, "width": 6}],
    "nucleusmoe_image": [{"text": 5}, {"batch": 2, "text": 12}],
    "pixart_alpha": [{"height": 4, "width": 10, "text": 5}, {"batch": 2, "height": 14, "width": 6}],
    "pixart_alpha_1024": [{"height": 4, "width": 10, "text": 5}, {"batch": 2, "height": 14, "width": 6}],
    "pixart_sigma": [{"height": 4, "width": 10, "text": 5}, {"batch": 2, "height": 3, "width": 2}],
    "qwenimage": [{"text": 5}, {"batch": 2, "text": 12}],
    "qwenimage21": [{"text": 5}, {"batch": 2, "text": 1}],
    "wan_animate": [{"frames": 1, "height": 4, "width": 10}, {"batch": 2, "frames": 5, "text": 520}],
    "z_image": [{"height": 4, "width": 12, "text": 5}, {"height": 14, "width": 2, "text": 32}],
}
"""Families that patches make free, with two calls each that have other sizes than the example's."""
ROUNDED = {"mochi": 1e-6, "qwenimage21": 1e-6, "wan_animate": 1e-6}
"""Families whose graph is equal to the model but for some ulp, with the relative error; the others are equal."""
FREED_BY_AXES = ["helios", "kandinsky5", "krea2"]
"""Families that need no patch for that at the zoo's sizes, only the meanings of their axes."""
FREED_QUICK = ["dit", "pixart_sigma", "qwenimage"]


def freed_families(quick: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in SIZES]


@functools.cache
def freed_graph_of(name: str) -> GraphModule:
    eager(name, FAMILIES[name].inputs(3))  # builds what is built in the first call
    return export_transformer(model_of(name), FAMILIES[name].inputs(3), check=False)


def tensors_at(name: str, sizes: dict[str, int]) -> list[Tensor]:
    """The example's tensors at other sizes, with masks that are a prefix of ones."""
    graph = freed_graph_of(name)
    values = free_sizes(graph).example | sizes
    assert free_sizes(graph).problem(values) is None
    tensors = flatten_call(model_of(name), FAMILIES[name].inputs(3))[1]
    found = [resized(tensors[spec.name], spec, values) for spec in input_specs(graph) or ()]
    return [
        x.sort(dim=-1, descending=True).values if "mask" in name_ and name_ != IMAGE_MASK and x.ndim == 2 else x
        for name_, x in zip(tensors, found, strict=True)
    ]


def families(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@functools.cache
def model_of(name: str) -> nn.Module:
    return FAMILIES[name].model()


@functools.cache
def graph_of(name: str) -> nn.Module:
    return export_transformer(model_of(name), FAMILIES[name].inputs(2), check=False)


@torch.no_grad()
def eager(name: str, inputs: dict[str, Any]) -> Tensor:
    model = model_of(name)
    options = {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}
    return model(**inputs, **options)[0]


@torch.no_grad()
def captured(name: str, inputs: dict[str, Any]) -> Tensor:
    output = graph_of(name)(*flatten_call(model_of(name), inputs)[1].values())
    return output[0] if isinstance(output, tuple) else output


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, relative to the largest value."""
    assert one.shape == other.shape and one.isfinite().all() and other.isfinite().all()
    return float((one - other).abs().max() / other.abs().max())


def attributes(model: nn.Module) -> list[dict[str, object]]:
    """Which objects every module holds; ``torch.export`` itself replaces tuples and lists by equal ones."""

    def one(value: object) -> object:
        return repr(value) if isinstance(value, (tuple, list)) else id(value)

    return [{name: one(value) for name, value in vars(module).items()} for module in model.modules()]


def test_every_family_that_needs_help_is_here():
    assert set(ALL) == {name for name, f in FAMILIES.items() if f.build.__module__.endswith(".difficult")}


# Free sizes


@pytest.mark.parametrize("name", freed_families(FREED_QUICK))
def test_a_graph_with_free_sizes_computes_what_the_model_does(name):
    graph = freed_graph_of(name)
    for sizes in ({}, *SIZES[name]):
        assert sizes.keys() <= set(free_sizes(graph).names)
        tensors = tensors_at(name, sizes)
        with torch.no_grad():
            expected, got = (
                tree_leaves(run(tensors))[0]
                for run in (functools.partial(call_like, graph, model_of(name)), lambda x: graph(*x))
            )
        assert torch.equal(expected, got) or difference(got, expected) < ROUNDED.get(name, 0)


@pytest.mark.parametrize("name", [p for p in freed_families(["dit"]) if p.values[0] not in FREED_BY_AXES])
def test_the_sizes_are_not_free_without_the_patches(name, monkeypatch):
    monkeypatch.setattr("ptq4dit_ao.capture.tracing.exportable", lambda _: contextlib.nullcontext())
    eager(name, FAMILIES[name].inputs(3))
    try:
        sizes = free_sizes(export_transformer(model_of(name), FAMILIES[name].inputs(3), check=False))
    except ExportError:
        return
    named = set().union(*SIZES[name]) <= set(sizes.names)
    assert not named or any(sizes.problem(sizes.example | other) for other in SIZES[name])


@pytest.mark.parametrize("padded", [False, True])
def test_qwenimage21_with_an_image_between_the_words(padded):
    """Words before it do not see it, words after it do, and the image that is made sees all."""
    inputs = FAMILIES["qwenimage21"].inputs(2)
    g = torch.Generator().manual_seed(1)
    slots = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    inputs |= {
        "hidden_states": noise(g, 2, 12 + 16, 16),
        "encoder_hidden_states": noise(g, 2, 9, 24),
        "encoder_hidden_states_mask": torch.arange(9) < torch.tensor([9, 7 if padded else 9])[:, None],
        "img_mask": slots.expand(2, -1).clone(),
        "img_shapes": [[(1, 2, 6), (1, 4, 4)]] * 2,
    }
    expected = eager("qwenimage21", inputs)
    with exportable(model_of("qwenimage21")):
        assert difference(eager("qwenimage21", inputs), expected) < 1e-6


@functools.cache
def layered_qwenimage() -> nn.Module:
    model = model_of("qwenimage")
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return type(model)(**config | {"use_layer3d_rope": True}).eval().requires_grad_(False)


@pytest.mark.slow
def test_a_layered_image_has_free_text():
    model, inputs = layered_qwenimage(), FAMILIES["qwenimage"].inputs(3)
    graph = export_transformer(model, inputs, dynamic=["batch", "text"], check=False)
    tensors = flatten_call(model, inputs)[1]
    for sizes in ({}, {"text": 5}, {"batch": 2, "text": 12}):
        values = free_sizes(graph).example | sizes
        cut = [resized(tensors[spec.name], spec, values) for spec in input_specs(graph) or ()]
        assert torch.equal(tree_leaves(graph(*cut))[0], tree_leaves(call_like(graph, model, cut))[0])


@pytest.mark.parametrize("name", ["pixart_sigma", pytest.param("cogvideox", marks=pytest.mark.slow)])
def test_positions_of_a_16_bit_model_are_rounded_at_its_own_size_only(name):
    """The model reads a rounded table there, and computes one in float32 at other sizes."""
    model = FAMILIES[name].model(dtype=torch.bfloat16)
    graph = export_transformer(model, FAMILIES[name].inputs(3, dtype=torch.bfloat16), check=False)
    tensors = flatten_call(model, FAMILIES[name].inputs(3, dtype=torch.bfloat16))[1]
    for sizes in ({}, {"height": 4, "width": 10}):
        values = free_sizes(graph).example | sizes
        inputs = [resized(tensors[spec.name], spec, values) for spec in input_specs(graph) or ()]
        with torch.no_grad():
            assert torch.equal(tree_leaves(graph(*inputs))[0], tree_leaves(call_like(graph, model, inputs))[0])


def test_a_table_that_would_not_be_recomputed_is_kept():
    model = FAMILIES["pixart_sigma"].model()
    model.pos_embed.pos_embed = model.pos_embed.pos_embed + 1
    before = attributes(model.pos_embed)
    with exportable(model):
        assert attributes(model.pos_embed) == before
    fixed = free_sizes(export_transformer(model, FAMILIES["pixart_sigma"].inputs(3), check=False)).fixed
    assert {"height of hidden_states", "width of hidden_states"} <= fixed.keys()


def test_a_graph_without_free_sizes_reads_the_table():
    inputs = FAMILIES["pixart_sigma"].inputs(3)
    graph = export_transformer(model_of("pixart_sigma"), inputs, dynamic=["batch"], check=False)
    assert not any("cos" in str(node.target) for node in graph.graph.nodes if "pos_embed" in str(node.meta))


@pytest.mark.slow
@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("name", ["hunyuan_video_framepack", "helios"])
def test_earlier_frames_are_free_at_larger_examples_than_their_coarsest_patch(name, patched, monkeypatch):
    if not patched:
        monkeypatch.setattr("ptq4dit_ao.capture.size_patches.tie", lambda *_: None)
        monkeypatch.setitem(PATCHES, "HunyuanVideoFramepackTransformer3DModel", lambda _: {})
    inputs = {
        key: x.repeat(1, 1, 1, 4, 3) if isinstance(x, Tensor) and x.ndim == 5 else x
        for key, x in FAMILIES[name].inputs(2).items()
    }
    try:
        sizes = free_sizes(export_transformer(model_of(name), inputs))
    except ExportError:
        assert not patched
        return
    heights = [axis for axis in sizes.fixed if axis.startswith(("height", "width", "frames"))]
    assert bool(heights) != patched
    assert not patched or ({"height", "width", "frames", "text"} <= set(sizes.names) and not sizes.conditions)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 33])
def test_linspace_with_tensor_ends(steps):
    start, end = torch.tensor(-3.25, dtype=torch.float64), torch.tensor(7.1, dtype=torch.float64)
    torch.testing.assert_close(linspace(start, end, steps), torch.linspace(-3.25, 7.1, steps), rtol=3e-7, atol=1e-6)


# The same function


@pytest.mark.slow
def test_cogvideox_at_another_size_than_its_own(monkeypatch):
    """Fewer frames than in its configuration: the positions are made anew."""
    model, inputs = model_of("cogvideox"), FAMILIES["cogvideox"].inputs(2)
    inputs["hidden_states"] = inputs["hidden_states"][:, :2]
    table = model.patch_embed._get_positional_embeddings(8, 8, 5)
    with exportable(model):
        assert torch.equal(model.patch_embed._get_positional_embeddings(8, 8, 5), table)
    graph = export_transformer(model, inputs)
    output = graph(*flatten_call(model, inputs)[1].values())
    assert difference(output[0] if isinstance(output, tuple) else output, eager("cogvideox", inputs)) < TOLERANCE
    monkeypatch.setattr("ptq4dit_ao.capture.tracing.exportable", lambda _: contextlib.nullcontext())
    with pytest.raises(ExportError, match="CogVideoXTransformer3DModel cannot be exported: "):
        export_transformer(model, inputs)


@pytest.mark.parametrize("name", families(ALL))
def test_the_graph_computes_what_the_unpatched_model_does(name):
    eager(name, FAMILIES[name].inputs(2))  # builds what is built in the first call
    before = attributes(model_of(name))
    for batch, seed in ((2, 0), (3, 1)):
        inputs = FAMILIES[name].inputs(batch, seed=seed)
        assert difference(captured(name, inputs), eager(name, inputs)) < TOLERANCE
    assert attributes(model_of(name)) == before


@pytest.mark.parametrize("name", ["chroma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hidream", "lumina2"))])
def test_the_patches_are_needed(name, monkeypatch):
    monkeypatch.setattr("ptq4dit_ao.capture.tracing.exportable", lambda _: contextlib.nullcontext())
    with pytest.raises(
        ExportError, match=f"{type(model_of(name)).__name__} cannot be exported: |batch .* cannot be free"
    ):
        export_transformer(model_of(name), FAMILIES[name].inputs(2), dynamic=["batch"])


# Masks


def masked(name: str, lengths: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of which so many words are valid, and the same with noise in the padding."""
    mask_name, text_name = MASKS[name]
    inputs = FAMILIES[name].inputs(len(lengths), seed=1)
    mask, text = inputs[mask_name], inputs[text_name]
    valid = torch.arange(mask.shape[1]) < torch.tensor(lengths)[:, None]
    padding = noise(torch.Generator().manual_seed(2), *text.shape)
    inputs = {**inputs, mask_name: valid.to(mask.dtype)}
    return inputs, {**inputs, text_name: torch.where(valid[..., None], text, padding)}


@pytest.mark.parametrize("name", families(list(MASKS)))
def test_padding_is_not_seen_and_words_are(name):
    inputs, noisy = masked(name, (2, 5, 8))
    output = captured(name, inputs)
    assert difference(output, eager(name, inputs)) < TOLERANCE
    assert difference(captured(name, noisy), output) < TOLERANCE
    shorter, _ = masked(name, (2, 4, 8))
    moved = captured(name, shorter) - output
    assert moved[1].abs().max() > 1e-4 * output.abs().max() and moved[[0, 2]].abs().max() < TOLERANCE
    longest, same = masked(name, (8, 8, 8))
    assert difference(captured(name, longest), eager(name, longest)) < TOLERANCE
    assert all(torch.equal(longest[key], same[key]) for key in MASKS[name])


@pytest.mark.parametrize("name", families(list(MASKS)))
def test_a_single_sample_may_be_padded(name):
    inputs, noisy = masked(name, (2,))
    assert difference(captured(name, inputs), eager(name, inputs)) < TOLERANCE
    assert difference(captured(name, noisy), captured(name, inputs)) < TOLERANCE


def test_mochi_without_words():
    inputs = masked("mochi", (0, 5, 8))[0]
    assert difference(captured("mochi", inputs), eager("mochi", inputs)) < TOLERANCE


def test_omnigen_has_other_frequencies_for_long_sequences():
    inputs = FAMILIES["omnigen"].inputs(3, seed=1)
    longer = {**inputs, "position_ids": inputs["position_ids"] + 40}
    assert difference(captured("omnigen", longer), eager("omnigen", longer)) < TOLERANCE
    assert difference(captured("omnigen", longer), captured("omnigen", inputs)) > 1e-4


@pytest.mark.slow
def test_hunyuan_video_sees_no_blank_image_and_no_padded_glyphs():
    name = "hunyuan_video15"
    inputs = FAMILIES[name].inputs(3, seed=1)
    blank = {**inputs, "image_embeds": torch.zeros_like(inputs["image_embeds"])}
    bare = {**blank, "encoder_attention_mask_2": torch.zeros_like(inputs["encoder_attention_mask_2"])}
    partly = {**inputs, "image_embeds": inputs["image_embeds"] * torch.tensor([0.0, 1, 1])[:, None, None]}
    for case in (blank, bare, partly):
        assert difference(captured(name, case), eager(name, case)) < TOLERANCE
    assert difference(captured(name, blank), captured(name, inputs)) > 1e-4
    assert difference(captured(name, bare), captured(name, blank)) > 1e-4


@pytest.mark.slow
def test_hidream_images_that_are_not_square():
    family, model = FAMILIES["hidream"], model_of("hidream")
    g = torch.Generator().manual_seed(3)
    first, second = ({**family.inputs(n), "hidden_states": noise(g, n, 4, 8, 12)} for n in (2, 3))
    exported = export_transformer(model, first, check=False)
    got = exported(*flatten_call(model, second)[1].values())
    assert difference(got, eager("hidream", second)) < TOLERANCE


# In place and away again


@pytest.mark.parametrize("name", ALL)
def test_patches_are_on_instances_and_go_away(name):
    model = model_of(name)
    kinds = {kind: dict(vars(kind)) for kind in map(type, model.modules())}
    before = attributes(model)
    with exportable(model):
        inside = attributes(model)
    assert inside != before and attributes(model) == before

    def interrupted() -> None:
        with exportable(model):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        interrupted()
    assert attributes(model) == before
    assert all(dict(vars(kind)) == content for kind, content in kinds.items())


def test_a_patch_that_fails_takes_back_those_before_it(monkeypatch):
    model = model_of("hidream")
    before, seen = attributes(model), []

    def broken(module: nn.Module) -> dict[str, Any]:
        seen.append(attributes(model) != before)
        raise KeyError("broken")

    monkeypatch.setitem(PATCHES, "MOEFeedForwardSwiGLU", broken)
    with pytest.raises(KeyError, match="broken"), exportable(model):
        pytest.fail("entered")
    assert seen == [True] and attributes(model) == before


def test_every_patch_is_of_a_family_here():
    models = [*map(model_of, (*ALL, *SIZES)), layered_qwenimage()]
    patched = {type(module).__name__ for model in models for module in model.modules()} & PATCHES.keys()
    assert patched == PATCHES.keys()


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_model_that_needs_no_patch_is_not_touched(name):
    model = FAMILIES[name].model()
    before = attributes(model)
    with exportable(model):
        assert attributes(model) == before


def test_only_classes_of_diffusers_are_patched():
    class LuminaPatchEmbed(nn.Module):
        pass

    module = LuminaPatchEmbed()
    before = attributes(module)
    with exportable(module):
        assert attributes(module) == before


def test_somebody_elses_attention_stays():
    model = FAMILIES["mochi"].model()
    attention = next(module for module in model.modules() if type(module).__name__ == "MochiAttention")
    attention.processor = object()
    before = attributes(attention)
    with exportable(model):
        assert attributes(attention) == before
