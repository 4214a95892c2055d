"""Between a graph and who calls it: what it takes, and what it was."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.export import captured_module
from ptq4dit_ao.capture.interface import CapturedModule, InputSpec, fit_inputs
from ptq4dit_ao.capture.signature import CallSignature, TensorName
from ptq4dit_ao.errors import ArgumentError, ArtifactError
from ptq4dit_ao.graph.names import placeholders

X = InputSpec(name="x", shape=(2, 3, 4), dtype=torch.float32, sizes=("batch", 3, 4))
T = InputSpec(name="t", shape=(2,), dtype=torch.int64, sizes=("batch",))
IDS = InputSpec(name="ids", shape=(5, 3), dtype=torch.float32, sizes=(5, 3))


class Adds(nn.Module):
    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return x + t[:, None, None] + ids.sum()


# -- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [("batch",), ()])
def test_a_placeholder_is_described(dynamic):
    example = {"x": torch.zeros(2, 3, 4), "t": torch.zeros(2, dtype=torch.int64), "ids": torch.zeros(5, 3)}
    graph = export_transformer(Adds().eval(), example, dynamic=dynamic)
    specs = [InputSpec.of(node) for node in placeholders(graph)]
    assert [spec.batched for spec in specs] == [bool(dynamic), bool(dynamic), False]
    assert [(s.name, s.shape, s.dtype) for s in specs] == [(s.name, s.shape, s.dtype) for s in (X, T, IDS)]


@pytest.mark.parametrize("spec", [X, T, IDS])
def test_a_description_comes_back_from_json(spec):
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("spec", [X, T, IDS])
def test_a_description_from_before_sizes_were_free_is_read(spec):
    old = {**spec.to_dict(), "batched": spec.batched}
    del old["sizes"]
    assert InputSpec.from_dict(old) == spec


@pytest.mark.parametrize(
    "change",
    [{"name": 1}, {"shape": [-1]}, {"shape": ["a"]}, {"shape": 3}, {"shape": [True]}, {"sizes": 1}, {"sizes": [2]}]
    + [{"sizes": [2.0, 3, 4]}, {"more": 0}]
    + [{"dtype": dtype} for dtype in ("float33", "nn", None)],
)  # fmt: skip
def test_descriptions_that_cannot_be_read(change):
    with pytest.raises(ArtifactError, match="is not one this version reads; quantize again"):
        InputSpec.from_dict({**X.to_dict(), **change})
    with pytest.raises(ArtifactError, match="is not one this version reads"):
        InputSpec.from_dict([])


# -- what a pipeline passes --------------------------------------------------------------------------------------------


def fit(x: Tensor, t: Tensor, ids: Tensor | None = None) -> list[Tensor]:
    return fit_inputs([X, T, IDS], [x, t, torch.zeros(5, 3) if ids is None else ids])


def test_inputs_that_fit_are_taken_as_they_are():
    x, t, ids = torch.randn(6, 3, 4), torch.arange(6), torch.randn(5, 3)
    assert all(a is b for a, b in zip(fit(x, t, ids), (x, t, ids), strict=True))


@pytest.mark.parametrize("t", [torch.tensor(7), torch.tensor([7])])
def test_one_time_for_all_samples_is_repeated(t):
    assert fit(torch.zeros(3, 3, 4), t)[1].tolist() == [7, 7, 7]


def test_one_sample_is_a_batch_of_one():
    assert [tuple(x.shape) for x in fit(torch.zeros(1, 3, 4), torch.tensor([7]))] == [(1, 3, 4), (1,), (5, 3)]


def test_floating_inputs_are_cast():
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    fitted = fit(x, torch.tensor([7, 8]))[0]
    assert fitted.dtype == torch.float32 and torch.equal(fitted, x.float())


@pytest.mark.parametrize("t", [torch.tensor([7.0, 999.0]), torch.tensor([7, 999], dtype=torch.int32)])
def test_times_that_are_whole_are_cast(t):
    assert torch.equal(fit(torch.zeros(2, 3, 4), t)[1], torch.tensor([7, 999]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(6, 3, 8), torch.arange(6)), r"x has shape \(6, 3, 8\), the graph was captured for \(6, 3, 4\)"),
        ((torch.zeros(3, 4), torch.arange(3)), r"x has shape \(3, 4\), .* quantize with samples of this size"),
        (
            (torch.zeros(6, 3, 4), torch.arange(4)),
            r"t has shape \(4,\), .* \(6,\); give all inputs the same number of row",
        ),
        ((torch.zeros(2, 3, 4), torch.arange(2), torch.zeros(7, 3)), r"ids has shape \(7, 3\), .* for \(5, 3\)"),
        ((torch.zeros(2, 3, 4), torch.tensor([1.5, 2])), r"t is float32 and holds 1\.5, .* captured for int64"),
        ((torch.zeros(2, 3, 4), torch.tensor([1, torch.nan])), "t is float32 and holds nan, which the graph cannot"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(ArgumentError, match=message):
        fit(*inputs)


KINDS = [torch.bool, torch.int64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("recorded", KINDS)
@pytest.mark.parametrize("given", KINDS)
def test_a_mask_is_cast_between_numbers_only(given, recorded):
    """A bool mask hides where it is False, a float one is added to scores: 0 and 1 mean other things."""
    spec, mask = InputSpec(name="mask", shape=(2, 3), dtype=recorded, sizes=("batch", 3)), torch.tensor([[1, 0, 1]] * 2)
    if (given is torch.bool) == (recorded is torch.bool):
        (fitted,) = fit_inputs([spec], [mask.to(given)])
        assert fitted.dtype is recorded and torch.equal(fitted, mask.to(recorded))
        return
    kinds = [str(dtype).removeprefix("torch.") for dtype in (given, recorded)]
    message = f"mask is {kinds[0]}, but the graph was captured for {kinds[1]}, and bool means something else than num"
    with pytest.raises(
        ArgumentError, match=f"{message}bers in a mask; give it as {kinds[1]}, or quantize with samples"
    ):
        fit_inputs([spec], [mask.to(given)])


def test_sizes_are_those_of_the_pipeline():
    message = r"x has shape \(2, 5, 4\), the graph was captured for \(2, 3, 4\); give the pipeline a height and width "
    factor = r"\(in pixels: those of the latents times its vae_scale_factor\), frames and a text length that fit"
    with pytest.raises(ArgumentError, match=f"{message}{factor}; or quantize with samples of this size"):
        fit_inputs([X], [torch.zeros(2, 5, 4)])
    with pytest.raises(ArgumentError, match=f"{message}{factor}, and use_resolution_binning=False, without"):
        fit_inputs([X], [torch.zeros(2, 5, 4)], binned=True)


def test_another_batch_than_the_fixed_one():
    fixed = InputSpec(name="x", shape=(2, 3), dtype=torch.float32, sizes=(2, 3))
    message = r"x has shape \(3, 3\), the graph was captured for \(2, 3\); .* if that is the batch, export with a"
    with pytest.raises(ArgumentError, match=message):
        fit_inputs([fixed], [torch.zeros(3, 3)])


# -- the module --------------------------------------------------------------------------------------------------------

CAPTURED = CapturedModule(
    config={"_class_name": "DiTTransformer2DModel", "num_layers": 2},
    call=CallSignature({"x": TensorName("x"), "ids": [None, 3, (TensorName("ids_2_0"),)]}),
)


def test_a_captured_module_comes_back_from_json():
    assert CapturedModule.from_dict(json.loads(json.dumps(CAPTURED.to_dict()))) == CAPTURED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"num_layers": 2}}, "not a configuration and a call; quantize again"),
        ({"config": {"_class_name": 3}}, "not a configuration and a call"),
        ({"config": None}, "not a configuration and a call"),
        ({"more": 1}, "not a configuration and a call"),
        (
            {"call": [1]},
            r"the transformer's call is damaged \(unknown structure \[1\] in the signature\)",
        ),
        ({"call": {"x": {"tensor": None}}}, "the transformer's call is damaged"),
    ],
)
def test_a_captured_module_that_is_damaged(change, message):
    with pytest.raises(ArtifactError, match=message):
        CapturedModule.from_dict({**CAPTURED.to_dict(), **change})


def test_a_call_that_json_would_change():
    with pytest.raises(ArtifactError, match="call cannot be saved: an argument is a dict with the key 1"):
        CapturedModule(config=CAPTURED.config, call=CallSignature({"x": {1: 2}})).to_dict()


def test_a_graph_of_a_diffusers_model_knows_it(tiny_exported):
    captured = captured_module(tiny_exported)
    assert captured is not None and captured.config["_class_name"] == "DiTTransformer2DModel"
    assert captured.config["sample_size"] == 8 and not any(key.startswith("_") for key in list(captured.config)[1:])
    assert captured.call.names == list(captured.call.arguments) == ["hidden_states", "timestep", "class_labels"]


def test_a_graph_of_another_model_does_not():
    assert captured_module(export_transformer(Adds().eval(), (*[torch.zeros(2, 1, 1)] * 2, torch.zeros(2)))) is None
