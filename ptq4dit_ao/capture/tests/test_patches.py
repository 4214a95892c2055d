"""What replaces uncapturable parts of diffusers computes the same, masks what is masked, and goes away again."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.number_patches import NUMBER_PATCHES
from ptq4dit_ao.capture.patches import PATCHES, exportable
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.errors import ExportError
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.testing.zoo.draw import noise

QUICK = ["cosmos", "lumina2", "lumina_next", "mochi", "omnigen"]
SLOW = ["chroma", "hidream", "hunyuan_video15", "hunyuan_video_framepack", "wan_animate"]
ALL = [*QUICK, *SLOW]
MASKS = {
    "lumina2": ("encoder_attention_mask", "encoder_hidden_states"),
    "lumina_next": ("encoder_mask", "encoder_hidden_states"),
    "mochi": ("encoder_attention_mask", "encoder_hidden_states"),
    "hunyuan_video15": ("encoder_attention_mask", "encoder_hidden_states"),
    "hunyuan_video_framepack": ("encoder_attention_mask", "encoder_hidden_states"),
}
TOLERANCE = 1e-5


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


# The same function


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
    monkeypatch.setattr("ptq4dit_ao.capture.export.exportable", lambda _: contextlib.nullcontext())
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
    monkeypatch.setattr("ptq4dit_ao.capture.export.exportable", lambda _: contextlib.nullcontext())
    with pytest.raises(ExportError, match=f"{type(model_of(name)).__name__} cannot be exported: "):
        export_transformer(model_of(name), FAMILIES[name].inputs(2))


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
    patched = {
        type(module).__name__ for name in (*ALL, "cogvideox") for module in model_of(name).modules()
    } & PATCHES.keys()
    assert patched | NUMBER_PATCHES.keys() == PATCHES.keys()  # test_size_numbers.py has those of numbers


@pytest.mark.parametrize("name", ["dit", "sd3"])
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
