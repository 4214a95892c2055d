"""Balance once, quantize anywhere: folds written back into modules of diffusers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from ptq4dit_ao import balance_module, collect_salience, export_transformer
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError, BalanceError
from ptq4dit_ao.passes import BalanceSettings
from ptq4dit_ao.testing.outliers import inject_outliers
from ptq4dit_ao.testing.zoo import FAMILIES, Family

BATCH = 4


def prepared(family: Family, model: nn.Module, dtype: torch.dtype = torch.float32):
    """The exported graph and its statistics over three batches."""
    exported = export_transformer(model, family.inputs(BATCH, dtype=dtype))
    samples = [tuple(flatten_call(model, family.inputs(BATCH, seed=i, dtype=dtype))[1].values()) for i in range(1, 4)]
    return exported, collect_salience(exported, samples)


def output(model: nn.Module, family: Family, dtype: torch.dtype = torch.float32):
    with torch.no_grad():
        return model(**family.inputs(BATCH, seed=9, dtype=dtype), return_dict=False)[0]


# Family: how many sites fold into existing parameters, and why one of the others does not.
EXPECTED = {
    "dit": (7, "gelu does not commute"),
    "sd3": (15, "gelu does not commute"),
    "flux": (15, "gelu does not commute"),
    "auraflow": (10, "norm1.linear.weight has no bias to fold into"),
    "pixart_sigma": (4, "would share one scale"),
    "lumina2": (None, "silu does not commute"),
}


LONG = ("flux", "auraflow", "lumina2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in EXPECTED]
)
def test_a_balanced_module_computes_the_same_in_float64(name):
    family, (count, left) = FAMILIES[name], EXPECTED[name]
    model = family.model(dtype=torch.float64)
    names = {key: value.shape for key, value in model.state_dict().items()}
    expected = output(model, family, torch.float64)
    exported, statistics = prepared(family, model, torch.float64)
    before = {key: value.clone() for key, value in exported.state_dict().items()}

    result = balance_module(model, exported, statistics)
    assert count is None or len(result.outcomes) == count
    assert len(result.outcomes) >= 4
    assert any(left in why for why in result.left.values())
    assert any((outcome.b - 1).abs().max() > 0.5 for outcome in result.outcomes.values())
    assert {key: value.shape for key, value in model.state_dict().items()} == names
    # Casts to float32 inside diffusers' modules bound what float64 can show.
    assert (output(model, family, torch.float64) - expected).norm() <= 1e-6 * expected.norm()
    assert result.output_change <= 1e-6
    assert all(torch.equal(value, before[key]) for key, value in exported.state_dict().items())


def test_the_checkpoint_reloads_and_matches(tmp_path):
    family = FAMILIES["sd3"]
    model = family.model()
    expected = output(model, family)
    balance_module(model, *prepared(family, model))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(again, family), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output(again, family), output(model, family))


def test_torchao_quantizes_a_balanced_module_better():
    family = FAMILIES["sd3"]
    model = inject_outliers(family.model())
    expected = output(model, family)
    balanced = copy.deepcopy(model)
    balance_module(balanced, *prepared(family, balanced))
    gain = []
    for module in (model, balanced):
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
        gain.append(sqnr_db(expected, output(module, family)))
    print(f"SQNR in dB, outliers injected: {gain[0]:.2f} as it is, {gain[1]:.2f} balanced")  # noqa: T201  (docs/results.md)
    assert gain[1] >= gain[0] + 5


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.other.weight = self.one.weight

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return self.one(h) + self.other(h) * t[:, None]

    torch.manual_seed(0)
    model = Tied().double().eval()
    inputs = (torch.randn(BATCH, 8, dtype=torch.float64), torch.arange(BATCH).double())
    expected = model(*inputs)
    exported = export_transformer(model, inputs)
    balance_module(model, exported, collect_salience(exported, [inputs]))
    assert model.other.weight is model.one.weight
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 2.56), (torch.float16, 20.48)])
def test_16_bits_bound_b_where_the_bias_form_would_lose_digits(dtype, largest):
    family = FAMILIES["sd3"]
    model = inject_outliers(family.model()).to(dtype)
    result = balance_module(model, *prepared(family, model, dtype))
    modulated = [outcome for outcome in result.outcomes.values() if outcome.site.scalars]
    others = [outcome for outcome in result.outcomes.values() if not outcome.site.scalars]
    assert modulated and others
    assert max(float(outcome.b.max()) for outcome in modulated) <= largest * 1.001
    assert not any(outcome.clipped.any() for outcome in modulated)
    assert min(float(outcome.b.min()) for outcome in modulated) < largest / 10  # scaled down, not cut off
    assert result.output_change <= 0.02


class Computed(nn.Module):
    """One weight is read as it is, and as part of another that is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        doubled = nn.functional.linear(x, self.linear.weight * 2)
        return self.out(self.linear(self.norm(x)) * t[:, None]) + doubled


def computed():
    torch.manual_seed(0)
    model = Computed().double().eval()
    with torch.no_grad():
        model.norm.weight[2] *= 50
    samples = [(torch.randn(BATCH, 8).double(), torch.arange(1, BATCH + 1).double()) for _ in range(2)]
    exported = export_transformer(model, samples[0])
    return model, exported, collect_salience(exported, samples), samples[0]


def test_a_parameter_that_another_weight_is_computed_from_is_left_alone():
    model, exported, statistics, _ = computed()
    with pytest.raises(BalanceError, match=r"linear\.weight is also part of a weight that is computed from it"):
        balance_module(model, exported, statistics)


def test_a_module_that_would_compute_something_else_is_put_back(monkeypatch):
    """As if the graph did not know of the computed weight: only the module itself can tell."""
    monkeypatch.setattr("ptq4dit_ao.passes.module.folded_sources", lambda _: frozenset())
    model, exported, statistics, inputs = computed()
    expected, before = model(*inputs), dict(model.named_parameters())
    with pytest.raises(BalanceError, match=r"changed its output by \S+ of its size; its parameters were restored"):
        balance_module(model, exported, statistics)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(*inputs), expected)


def test_a_refused_module_is_not_half_balanced():
    family = FAMILIES["sd3"]
    model = family.model()
    exported, statistics = prepared(family, model)
    owner, _, name = list(dict(model.named_parameters()))[-1].rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ArgumentError, match="is not the module's"):
        balance_module(model, exported, statistics)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_graph_of_another_module_is_refused():
    family = FAMILIES["sd3"]
    model, other = family.model(), family.model()
    exported, statistics = prepared(family, other)
    with pytest.raises(ArgumentError, match=r"parameter '.*' of the graph is not the module's; export this module"):
        balance_module(model, exported, statistics)


def test_nothing_to_fold_is_an_error():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x)) * t[:, None]

    model = Plain().eval()
    exported = export_transformer(model, (torch.randn(BATCH, 8), torch.ones(BATCH)))
    statistics = collect_salience(exported, [(torch.randn(BATCH, 8), torch.arange(BATCH).float())])
    with pytest.raises(
        BalanceError, match="nothing can be folded into the parameters of Plain .*the norm has no weight"
    ):
        balance_module(model, exported, statistics, BalanceSettings())


# -- parameters that the captured call does not read ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_what_was_fused_is_balanced_as_the_fused_weight_is(name, tmp_path):
    family = FAMILIES[name]
    model = family.model()
    expected = output(model, family)
    model.fuse_qkv_projections()
    result = balance_module(model, *prepared(family, model))
    assert any(layer.endswith("to_qkv") for site in result.outcomes.values() for layer in layers_of(site))
    assert not result.unread
    model.save_pretrained(tmp_path)
    assert sqnr_db(expected, output(type(model).from_pretrained(tmp_path).eval(), family)) >= 100
    model.unfuse_qkv_projections()
    assert sqnr_db(expected, output(model, family)) >= 100


def layers_of(outcome):
    return [consumer.layer for consumer in outcome.site.consumers]


def test_fused_weights_that_differ_by_now_are_no_twins():
    family = FAMILIES["sd3"]
    model = family.model()
    model.fuse_qkv_projections()
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_k.weight += 1
    before = model.transformer_blocks[0].attn.to_k.weight.clone()
    result = balance_module(model, *prepared(family, model))
    unread = [f"transformer_blocks.0.attn.to_k.{leaf}" for leaf in ("weight", "bias")]
    assert list(result.unread) == unread
    refusals = [why for site, why in result.left.items() if "blocks.0.attn" in site]
    assert refusals and all(f"{unread[0]} is not read by the captured call" in why for why in refusals)
    assert not any("blocks.0.attn" in site for site in result.outcomes)
    assert torch.equal(model.transformer_blocks[0].attn.to_k.weight, before)


class TwoWays(nn.Module):
    """A second branch that only some calls take, as image prompts have in Wan."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("to_v", "add_v", "to_out")})
        self.norm2, self.down = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x, timestep, image=None):
        x = self.norm(self.up(x))
        v = self.attn["to_v"](x)
        if image is not None:
            v = v + self.attn["add_v"](image)
        return self.down(self.norm2(self.attn["to_out"](v) + timestep[:, None]))


def test_a_branch_that_the_captured_call_does_not_take_is_still_right():
    torch.manual_seed(0)
    model = TwoWays().eval()
    samples = [(torch.randn(4, 8), torch.arange(4.0) + 10 * i) for i in range(3)]
    image = torch.randn(4, 8)
    expected = model(*samples[0], image)
    exported = export_transformer(model, samples[0])
    result = balance_module(model, exported, collect_salience(exported, samples))
    assert result.unread == ("attn.add_v.weight", "attn.add_v.bias")
    assert "attn.add_v.weight is not read by the captured call, and a call" in result.left["attn.to_out"]
    assert sqnr_db(expected, model(*samples[0], image)) >= 100


def test_sites_of_a_layer_with_an_adapter_that_is_switched_off_are_left():
    peft = pytest.importorskip("peft")
    family = FAMILIES["flux"]
    model = family.model()
    for name in ("one", "other"):
        layers = ["transformer_blocks.0.attn.to_v"]
        model.add_adapter(peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False), adapter_name=name)
    model.set_adapter("other")
    expected = output(model, family)
    model.set_adapter("one")
    result = balance_module(model, *prepared(family, model))
    assert all(".one" not in path for path in result.unread) and len(result.unread) == 2
    (why,) = (why for site, why in result.left.items() if "transformer_blocks.0.attn" in site and "to_out" in site)
    assert "transformer_blocks.0.attn.to_v.lora_A.other.weight is not read by the captured call" in why
    assert len(result.outcomes) >= 8
    model.set_adapter("other")
    assert sqnr_db(expected, output(model, family)) >= 100
