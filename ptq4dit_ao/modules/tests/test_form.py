"""The module form has the integers of the graph and computes what the graph does; what it cannot hold is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ptq4dit_ao import (
    apply_recipe,
    as_fast_module,
    balance_result,
    export_transformer,
    load_quantized,
    prove_kernels,
    to_module,
)
from ptq4dit_ao.capture.call import Call
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError, ArtifactError, ExportError, LoweringError
from ptq4dit_ao.lowering.match import quantized_linears
from ptq4dit_ao.modules.form import integer_weights
from ptq4dit_ao.recipe import Activations, Attention, Balance, Override, Recipe, Rounding, Weights
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow import QuantizedModel

ALL = Balance(method="max", sites="all")
GPTQ = Rounding(method="gptq", ranges="output", sequential=True)


@functools.cache
def case(
    name: str, bits: int = 8, sites: Any = "all", rounding: str = "nearest", dynamic: Any = False, x_bits: int = 8
) -> tuple[nn.Module, QuantizedModel]:
    """A family's tiny model and its quantized form. Not to be changed."""
    family = FAMILIES[name]
    model = family.model()
    batches = [tuple(flatten_call(model, family.inputs(2, seed=seed))[1].values()) for seed in range(3)]
    recipe = Recipe(
        layers="paper",
        weights=Weights(bits=bits),
        activations=Activations(bits=x_bits, dynamic=dynamic),
        balance=Balance(method="max", sites=sites),
        rounding=GPTQ if rounding == "gptq" else Rounding(),
    )
    return model, apply_recipe(export_transformer(model, family.inputs(2)), recipe, batches)


def outputs(value: object) -> Tensor:
    return torch.cat([x.flatten() for x in tree_leaves(value) if isinstance(x, Tensor)])


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "bits", "sites", "rounding"),
    [
        ("dit", 8, "folded", "gptq"),
        ("dit", 4, "all", "gptq"),
        ("pixart_sigma", 4, "folded", "nearest"),
        slow("sd3", 8, "all", "nearest"),
        *(
            slow(name, 8, "all", "gptq")
            for name in ("flux", "wan", "wan22", "auraflow", "lumina2", "sana", "hunyuan_video")
        ),
    ],
)
@torch.no_grad()
def test_a_module_computes_what_the_graph_of_its_artifact_does(name, bits, sites, rounding):
    model, quantized = case(name, bits, sites, rounding)
    before = copy.deepcopy(model.state_dict())
    module = to_module(quantized, model)
    batch = tuple(flatten_call(model, FAMILIES[name].inputs(2, seed=9))[1].values())
    graph, found = outputs(quantized.graph(*batch)), outputs(Call(module, quantized.captured.call)(batch))
    assert min(weight.bits for weight in integer_weights(module).values()) == bits
    assert sqnr_db(graph, found) > 45 and type(module) is type(model)  # a value between two steps may go either way
    linears, weights = quantized_linears(quantized.graph), integer_weights(module)
    paths = balance_result(quantized.graph).weights
    assert len(weights) == len({paths[linear.name] for linear in linears}) > 5
    for linear in linears:
        weight = weights[paths[linear.name].removesuffix(".weight")]
        assert torch.equal(weight.qdata, linear.weight) and 2**weight.bits > linear.weight_range[1] * 2
        assert (float(weight.x_scale), int(weight.x_zero_point)) == (
            pytest.approx(linear.x_scale),
            linear.x_zero_point - linear.x_range[0],
        )
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(("name", "sites"), [("dit", "folded"), slow("sd3", "all")])
@torch.no_grad()
def test_a_module_quantizes_tokens_as_the_graph_does(name, sites, tmp_path):
    model, quantized = case(name, 8, sites, dynamic="token")
    module = to_module(quantized, model)
    assert all(weight.dynamic for weight in integer_weights(module).values())
    inputs = FAMILIES[name].inputs(2, seed=9)
    batch = tuple(flatten_call(model, inputs)[1].values())
    expected, found = outputs(quantized.graph(*batch)), outputs(Call(module, quantized.captured.call)(batch))
    assert sqnr_db(expected, found) > 45
    proof = prove_kernels(module, lambda: module(**inputs))
    assert proof.integer_gemms == proof.promised >= len(integer_weights(module))
    with pytest.raises(ArgumentError, match="method 'torchao' cannot hold .* quantized per token around the token's"):
        to_module(quantized, model, method="torchao")
    module.save_pretrained(tmp_path / "module")
    loaded = type(model).from_pretrained(tmp_path / "module")
    assert torch.equal(outputs(loaded(**inputs)), outputs(module(**inputs)))


@pytest.mark.parametrize("method", ["torchao", "ptq4dit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_module_multiplies_floats_by_integers_as_the_graph_does(method, dtype, tmp_path):
    bits = 8 if method == "torchao" else 4
    model, quantized = case("sd3", bits, "all", x_bits=16)
    narrow = copy.deepcopy(model).to(dtype)
    if (method, dtype) == ("torchao", torch.bfloat16):
        with pytest.raises(ArgumentError, match="its input is balanced in float32 and stays torch.bfloat16"):
            to_module(quantized, narrow, method=method)
        return
    module = to_module(quantized, narrow, method=method)
    weights = integer_weights(module)
    assert min(weight.bits for weight in weights.values()) == bits
    assert len(weights) > 5 and all(weight.x_bits == 16 for weight in weights.values())
    inputs = FAMILIES["sd3"].inputs(2, seed=9, dtype=dtype)
    batch = tuple(flatten_call(model, FAMILIES["sd3"].inputs(2, seed=9))[1].values())
    expected, found = outputs(quantized.graph(*batch)), outputs(module(**inputs)).float()
    assert sqnr_db(expected, found) > (90 if dtype == torch.float32 else 25)
    module.save_pretrained(tmp_path / "module")
    loaded = type(model).from_pretrained(tmp_path / "module", torch_dtype=dtype)
    assert sqnr_db(found, outputs(loaded(**inputs)).float()) > (90 if dtype == torch.float32 else 25)
    stored = sum(file.stat().st_size for file in (tmp_path / "module").glob("*.safetensors"))
    assert stored < 0.6 * 4 * sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_what_is_saved_makes_the_same_module(tmp_path):
    model, quantized = case("sd3")
    quantized.save(tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    inputs = FAMILIES["sd3"].inputs(2, seed=4)
    one, other = to_module(quantized, model), to_module(loaded, model)
    assert torch.equal(outputs(one(**inputs)), outputs(other(**inputs)))
    (tmp_path / "model" / "balance.safetensors").write_bytes(b"{}")
    with pytest.raises(ArtifactError, match=r"balance\.safetensors has 2 bytes, the manifest says \d+"):
        load_quantized(tmp_path / "model")


def test_other_parameters_are_shared_and_another_float_model_may_be_given():
    model, quantized = case("sd3")
    module = to_module(quantized, model, verify=False)
    name = next(name for name, _ in model.named_parameters() if "pos_embed.proj" in name)
    assert module.get_parameter(name).data_ptr() == model.get_parameter(name).data_ptr()
    module.get_parameter(name).data = torch.zeros(0)  # as a move to another device does
    assert model.get_parameter(name).numel() > 0
    narrow = to_module(quantized, copy.deepcopy(model).to(torch.bfloat16), verify=False)
    inputs = FAMILIES["sd3"].inputs(2, dtype=torch.bfloat16)
    with torch.no_grad():
        output = narrow(**inputs).sample
    assert output.dtype == torch.bfloat16
    assert sqnr_db(outputs(model(**FAMILIES["sd3"].inputs(2))), outputs(output).float()) > 10


@torch.no_grad()
def test_its_kernels_are_counted_and_a_float_one_is_an_error(monkeypatch):
    model, quantized = case("sd3")
    module = to_module(quantized, model)
    proof = prove_kernels(module, lambda: module(**FAMILIES["sd3"].inputs(2)))
    assert proof.integer_gemms == proof.promised >= len(integer_weights(module))
    from ptq4dit_ao.modules import form

    monkeypatch.setattr(form, "KERNELS", ("none::such",))
    with pytest.raises(LoweringError, match=r"ran 0 of \d+ quantized linears on integer kernels"):
        prove_kernels(module, lambda: module(**FAMILIES["sd3"].inputs(2)))
    with pytest.raises(LoweringError, match="no quantized linear was called"):
        prove_kernels(module, lambda: None, allow_float_fallback=True)


class Twice(nn.Module):
    """A linear that is called twice, with inputs of different ranges, and one whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.twice, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.twice(torch.tanh(self.fc(x))))
        return self.out(torch.sin(self.twice(h * 5))) + 0 * t[:, None]


def small(model: nn.Module, **sections: Any) -> QuantizedModel:
    g = torch.Generator().manual_seed(0)
    samples = [(torch.randn(8, 16, generator=g), torch.arange(8.0)) for _ in range(4)]
    return apply_recipe(model.eval().requires_grad_(False), Recipe(**{"balance": ALL, **sections}), samples)


@torch.no_grad()
def test_a_linear_that_is_called_twice_has_one_range_for_both():
    torch.manual_seed(0)
    model = Twice()
    quantized = small(model)
    module = to_module(quantized, model)
    x = (torch.randn(8, 16), torch.arange(8.0))
    assert len(integer_weights(module)) == 3 and len(quantized_linears(quantized.graph)) == 4
    assert sqnr_db(model(*x), module(*x)) > 30


class Tied(Twice):
    """A linear without a bias whose weight is that of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.other = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.other.weight = self.twice.weight

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.twice(torch.tanh(self.fc(x))))
        return self.out(torch.sin(self.other(h * 5))) + 0 * t[:, None]


@torch.no_grad()
def test_tied_linears_are_both_quantized_and_stay_tied():
    torch.manual_seed(0)
    model = Tied()
    module = to_module(small(model), model)
    assert set(integer_weights(module)) == {"fc", "twice", "other", "out"}
    assert module.twice.weight is module.other.weight
    x = (torch.randn(8, 16), torch.arange(8.0))
    assert sqnr_db(model(*x), module(*x)) > 25
    model.other.bias = nn.Parameter(torch.ones(16))
    with pytest.raises(ArgumentError, match=r"its weight is tied to that of other\.weight, whose bias is another one"):
        to_module(small(model), model)


def test_the_float_model_keeps_its_gradients_and_a_processor_without_vnni_is_refused(monkeypatch):
    torch.manual_seed(0)
    model = Twice()
    quantized = small(model)
    model.requires_grad_(True)
    to_module(quantized, model, verify=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    module = to_module(quantized, model, verify=False)
    from ptq4dit_ao.lowering import machine
    from ptq4dit_ao.modules import kernels

    for place in (machine, kernels):
        monkeypatch.setattr(place, "has_dot_product", lambda: False)
    with pytest.raises(ArgumentError, match="has neither VNNI nor AMX, so 8-bit products overflow 16 bits"):
        to_module(quantized, model, verify=False)
    with (
        torch.no_grad(),
        pytest.raises(LoweringError, match="would compute wrong products: .*quantize activations to 7"),
    ):
        module(torch.randn(8, 16), torch.arange(8.0))


class Parametrized(Twice):
    """Its second linear takes a slice of a larger weight."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.nn.functional.linear(torch.tanh(self.fc(x)), self.twice.weight + self.out.weight, None)
        return self.out(torch.tanh(h)) + 0 * t[:, None]


@torch.no_grad()
def test_a_linear_that_a_module_cannot_hold_is_named_or_left_in_float():
    torch.manual_seed(0)
    model = Parametrized()
    quantized = small(model)
    with pytest.raises(ArgumentError, match=r"Parametrized cannot hold 2 of 3 .*computed from several parameters"):
        to_module(quantized, model)
    module = to_module(quantized, model, allow_float_fallback=True)
    assert set(integer_weights(module)) == {"fc"}


def test_another_module_or_no_module_is_refused():
    model, quantized = case("sd3")
    for wrong, error, message in [
        (FAMILIES["dit"].model(), ArgumentError, r"cannot hold \d+ of \d+ quantized linears .*the module has no"),
        (quantized.graph, ArgumentError, "model is a graph; give the float module"),
        ("sd3", ArgumentError, "model is 'sd3' .*; give the float module that was quantized"),
        (to_module(quantized, model, verify=False), ExportError, r"is already quantized, by ptq4dit_ao\.modules"),
    ]:
        with pytest.raises(error, match=message):
            to_module(quantized, wrong)
    with pytest.raises(ArgumentError, match="give what apply_recipe or load_quantized returned"):
        to_module(model, model)
    with pytest.raises(ArgumentError, match=r"model is of torch\.float64; give one of torch\.float32"):
        to_module(quantized, copy.deepcopy(model).double())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"attention": Attention(quantize=True)}, "attention is quantized, which a module cannot hold"),
        ({"balance": Balance(method="max", fold_form="bias")}, r"holds the 1 of 1 \+ scale"),
    ],
)
def test_what_only_a_graph_holds_is_refused(tiny_dit, tiny_samples, sections, message):
    quantized = apply_recipe(tiny_dit, Recipe(layers="paper", **sections), tiny_samples)
    with pytest.raises(ArgumentError, match=message):
        to_module(quantized, tiny_dit)


@pytest.mark.parametrize("balance", [{"method": "ssc", "center": True}, {"method": "repq"}], ids=["centred", "repq"])
@torch.no_grad()
def test_a_centred_graph_and_its_module_agree(tiny_dit, tiny_samples, tmp_path, balance):
    def biased(module):  # channels far from 0, so that the offsets count
        for block in module.transformer_blocks:
            block.norm1.linear.bias[: 2 * 32 : 3] += 2
        return module

    model = biased(copy.deepcopy(tiny_dit))
    recipe = Recipe(layers="paper", balance=Balance(**balance))
    quantized = apply_recipe(model, recipe, tiny_samples)
    outcomes = balance_result(quantized.graph).outcomes.values()
    assert any(outcome.offset is not None and outcome.offset.abs().max() > 0.5 for outcome in outcomes)
    assert any(linear.shift is not None for linear in quantized.linears)
    module = to_module(quantized, model)
    assert module.config.quantization_config.quant_method.value == "ptq4dit"
    call = dict(zip(("hidden_states", "timestep", "class_labels"), tiny_samples[0], strict=True))
    expected = quantized.graph(*tiny_samples[0])
    assert sqnr_db(expected, outputs(module(**call)).view_as(expected)) > 60
    module.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(again(**call)), outputs(module(**call)))
    assert sqnr_db(outputs(model(**call)), outputs(again.dequantize()(**call))) > 25
    with pytest.raises(ArgumentError, match="method 'torchao' cannot hold .*: its input is centred"):
        to_module(quantized, model, method="torchao")


@torch.no_grad()
def test_float_inputs_beside_static_ones_come_back_from_torchaos_format(tiny_dit, tiny_samples, tmp_path):
    recipe = Recipe(overrides=(Override(pattern="*.norm1.linear", activation_bits=16, balance=False),))
    module = to_module(apply_recipe(tiny_dit, recipe, tiny_samples), tiny_dit, method="torchao")
    module.save_pretrained(tmp_path / "m")
    loaded = as_fast_module(type(tiny_dit).from_pretrained(tmp_path / "m", torch_dtype=torch.float32))
    bits = {name: weight.x_bits for name, weight in integer_weights(loaded).items()}
    assert bits == {name: weight.x_bits for name, weight in integer_weights(module).items()}
    assert set(bits.values()) == {8, 16}
    inputs = dict(zip(("hidden_states", "timestep", "class_labels"), tiny_samples[0], strict=True))
    assert torch.equal(outputs(loaded(**inputs)), outputs(module(**inputs)))
    assert all(type(p.data) is Tensor for p in loaded.dequantize().parameters())


def test_overrides_bits_and_inputs_of_fewer_bits_reach_the_module(tiny_dit, tiny_samples):
    overrides = (
        Override(pattern="*.to_q", weight_bits=4), Override(pattern="*.to_k", activation_bits=6),
        Override(pattern="*.to_v", skip=True),
    )  # fmt: skip
    module = to_module(apply_recipe(tiny_dit, Recipe(overrides=overrides), tiny_samples), tiny_dit)
    weights = integer_weights(module)
    assert weights["transformer_blocks.0.attn1.to_q"].bits == 4
    assert weights["transformer_blocks.1.attn1.to_k"].x_bits == 6
    assert not any(name.endswith("to_v") for name in weights)
    assert module.config.quantization_config.quant_method.value == "ptq4dit"
    with pytest.raises(ArgumentError, match="method 'torchao' cannot hold .*to_k: its input has 6 bits.*; use method"):
        to_module(apply_recipe(tiny_dit, Recipe(overrides=overrides), tiny_samples), tiny_dit, method="torchao")
