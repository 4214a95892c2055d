"""Capturing a model: the same function, the same names, the model untouched, and refusals that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer, free_sizes
from ptq4dit_ao.capture.interface import InputSpec
from ptq4dit_ao.errors import ExportError
from ptq4dit_ao.graph import find_sites
from ptq4dit_ao.graph.names import layer_name, linears, placeholders
from ptq4dit_ao.graph.shapes import symbolic_axes, tensor_of
from ptq4dit_ao.passes import fold_balance, insert_balance

WIDTH = 8


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.scale, self.linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("offset", torch.randn(WIDTH))

    def forward(self, tokens: Tensor, timestep: Tensor) -> Tensor:
        condition = self.scale(timestep[:, None].expand(-1, WIDTH) / 1000)
        return self.linear(self.norm(tokens + self.offset) * (1 + condition[:, None]))


class Diffusers(Modulated):
    """The calling convention of diffusers: keyword arguments in between, and ``return_dict``."""

    def forward(self, tokens, timestep=None, attention_kwargs=None, return_dict=True):  # type: ignore[override]
        result = super().forward(tokens, timestep)
        return {"sample": result} if return_dict else (result, None)


def sample(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randn(batch, 5, WIDTH, generator=generator)
    return tokens, torch.rand(batch, generator=generator) * 1000


@pytest.fixture(params=[Modulated, Diffusers])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval()


def output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    result = model(*inputs)
    return result["sample"] if isinstance(result, dict) else result


@pytest.mark.parametrize("batch", [2, 1, 7])
def test_the_graph_computes_what_the_model_does_at_any_batch(model, batch):
    exported = export_transformer(model, sample(2))
    torch.testing.assert_close(exported(*sample(batch)), output(model, sample(batch)))


def test_inputs_and_layers_keep_their_names(model):
    exported = export_transformer(model, sample(2))
    assert [node.target for node in placeholders(exported)] == ["tokens", "timestep"]
    assert [layer_name(node) for node in linears(exported)] == ["scale", "linear"]
    assert set(exported.state_dict()) == set(model.state_dict())


def test_the_model_is_not_touched_by_export_nor_by_a_fold_of_the_graph(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = dict(model.named_parameters())
    attributes = set(vars(model))
    inputs = sample(3)
    expected = output(model, inputs)

    exported = export_transformer(model, sample(2))
    for site in find_sites(exported):
        if site.refusal is None:
            b = torch.full((site.num_variables,), 3.0, dtype=torch.float64)
            insert_balance(exported, site, b)
            fold_balance(exported, site, b)
    exported.recompile()
    torch.testing.assert_close(exported(*inputs), expected)
    assert not torch.equal(exported.linear.weight, model.linear.weight)

    assert set(vars(model)) == attributes
    assert "forward" not in vars(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(objects[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(output(model, inputs), expected)


def test_a_static_batch_may_be_one(model):
    exported = export_transformer(model, sample(1), dynamic=())
    torch.testing.assert_close(exported(*sample(1)), output(model, sample(1)))


class Broken(nn.Module):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return self.linear(x) if x.sum() > 0 else x


def test_a_model_that_branches_on_its_data_is_refused():
    with pytest.raises(
        ExportError, match=r"Broken cannot be exported: \w+: .*data-dependent.*leave 'batch' out of dynamic"
    ):
        export_transformer(Broken().eval(), (torch.randn(2, WIDTH),))


@pytest.mark.parametrize("error", [NotImplementedError("no such thing\nsecond line"), AssertionError()])
def test_whatever_the_model_raises_is_an_export_error(error):
    first_line = str(error).split("\n")[0]
    with pytest.raises(
        ExportError, match=f"Broken cannot run on the example inputs: {type(error).__name__}: {first_line}"
    ) as caught:
        export_transformer(Broken(error).eval(), (torch.randn(2, WIDTH),))
    assert "second line" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_training_mode_is_refused():
    with pytest.raises(ExportError, match=r"Modulated is in training mode; call \.eval\(\) before exporting it"):
        export_transformer(Modulated().train(), sample(2))


class Dropping(Modulated):
    def __init__(self, layer):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(layer)])

    def forward(self, x, t):
        return self.blocks[0](super().forward(x, t))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x) if self.training else x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.1), r"'blocks\.0\.0' of Dropping \(Dropout\) is in training mode; call \.eval\(\) on the whole"),
        (nn.BatchNorm1d(5), r"'blocks\.0\.0' of Dropping \(BatchNorm1d\) is in training mode"),
        (Noise(), r"does not compute what the model does: .* or it is random, as 'blocks\.0' is in training mode"),
    ],
)
def test_a_layer_left_in_training_mode_is_named(layer, message):
    model = Dropping(layer).eval()
    model.blocks[0].train()
    with pytest.raises(ExportError, match=message):
        export_transformer(model, sample(2))
    export_transformer(model.eval(), sample(2))


def test_a_training_mode_that_changes_nothing_is_no_matter():
    model = Dropping(nn.Dropout(0.0)).eval()
    model.blocks.train()
    assert torch.equal(export_transformer(model, sample(2))(*sample(2)), model(*sample(2)))


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(sample(1), id="batch of one"),
        pytest.param((sample(2)[0], sample(3)[1]), id="different batches"),
        pytest.param((sample(2)[0], torch.tensor(500.0)), id="timestep without a batch"),
        pytest.param((), id="no inputs"),
    ],
)
def test_inputs_without_a_common_batch_are_refused(inputs):
    with pytest.raises(ExportError, match="at least 2|hold no tensor") as caught:
        export_transformer(Modulated().eval(), inputs)
    assert all(str(tuple(x.shape)) in str(caught.value) for x in inputs[:1])


def test_more_inputs_than_the_model_takes_are_refused():
    with pytest.raises(ExportError, match=r"Modulated takes 2 inputs \(tokens, timestep\), got 3"):
        export_transformer(Modulated().eval(), (*sample(2), torch.zeros(2)))


def test_too_few_inputs_are_refused():
    with pytest.raises(
        ExportError, match="Modulated cannot run on the example inputs: TypeError: .*missing 1 required"
    ):
        export_transformer(Modulated().eval(), sample(2)[:1])


def test_a_batch_that_the_model_computes_with_can_be_made_static():
    class Listed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor([1.0] * x.shape[0])[:, None]

    with pytest.raises(ExportError, match="the batch of x cannot be free: .* fixes it at 2; leave it out of dynamic"):
        export_transformer(Listed().eval(), (torch.zeros(2, 3),), dynamic=("batch",))
    for options in ({}, {"dynamic": ()}):
        exported = export_transformer(Listed().eval(), (torch.zeros(2, 3),), **options)
        assert torch.equal(exported(torch.zeros(2, 3)), torch.ones(2, 3))
        assert not free_sizes(exported).sizes


# Keyword arguments


class Assorted(nn.Module):
    """Tensors in a list and a dict, and values that are none; order and count of outputs as diffusers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens, parts, ids, sizes=None, repeat=1, gains=None, return_dict=True):
        x = tokens + sum(part * (i + 1) for i, part in enumerate(parts)) + ids
        for _ in range(repeat):
            x = self.linear(x)
        x = x if sizes is None else x * sizes["height"][:, None, None]
        assert gains is None and return_dict is False
        return (x, None, {"first": x[:, 0], "seen": ids.sum()})


def keywords(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "sizes": {"height": torch.rand(batch, generator=generator), "crop": None},
        "repeat": 2,
        "tokens": torch.randn(batch, 5, WIDTH, generator=generator),
        "ids": torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)),
        "parts": [torch.randn(batch, 5, WIDTH, generator=generator) for _ in range(2)],
        "gains": None,
    }


def positional(keywords: dict[str, Any]) -> tuple[Tensor, ...]:
    return keywords["tokens"], *keywords["parts"], keywords["ids"], keywords["sizes"]["height"]


@pytest.fixture(scope="module")
def assorted() -> tuple[nn.Module, GraphModule]:
    model = Assorted().eval()
    return model, export_transformer(model, keywords(2))


def test_tensors_in_keyword_arguments_become_inputs_in_the_order_of_forward(assorted):
    names = [node.target for node in placeholders(assorted[1])]
    assert names == ["tokens", "parts_0", "parts_1", "ids", "sizes_height"]


@pytest.mark.parametrize("batch", [2, 1, 7])
def test_several_outputs_are_a_tuple_of_the_tensors(assorted, batch):
    model, exported = assorted
    got, expected = exported(*positional(keywords(batch))), model(**keywords(batch), return_dict=False)
    assert isinstance(got, tuple) and len(got) == 3
    torch.testing.assert_close(got, (expected[0], *expected[2].values()))


def test_only_tensors_that_carry_the_batch_have_a_dynamic_batch(assorted):
    specs = [InputSpec.of(node) for node in placeholders(assorted[1])]
    assert [spec.batched for spec in specs] == [True, True, True, False, True]
    assert [spec.sizes[0] for spec in specs if not spec.batched] == ["tokens"]


def test_a_keyword_argument_keeps_its_example_where_the_batch_is_static():
    model = Assorted().eval()
    exported = export_transformer(model, keywords(1), dynamic=())
    assert not any(symbolic_axes(node) for node in exported.graph.nodes if tensor_of(node) is not None)
    torch.testing.assert_close(exported(*positional(keywords(1)))[0], model(**keywords(1), return_dict=False)[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"repeat": 3}, "the example inputs hold no tensor; give at least one, whose first axis is the batch"),
        (keywords(1), r"the first example input has shape \(1, 5, 8\); a dynamic batch needs at least 2 rows"),
        ({**keywords(2), "tokens": torch.tensor(1.0)}, r"the first example input has shape \(\); a dynamic batch"),
    ],
)
def test_keyword_arguments_without_a_batch_are_refused(inputs, message):
    with pytest.raises(ExportError, match=message):
        export_transformer(Assorted().eval(), inputs)


# The check against the model


class Odd(nn.Module):
    """A graph of it repeats what the export saw."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        extra = torch.rand(WIDTH) if self.kind == "random" else 0.1 * self.calls
        if self.kind == "nan":
            extra = torch.full((WIDTH,), float("nan"))
        return self.linear(x) + extra


@pytest.mark.parametrize("kind", ["random", "counting"])
def test_a_graph_that_does_not_agree_with_the_model_is_refused(kind):
    inputs = (torch.randn(2, WIDTH),)
    message = r"the graph of Odd does not compute what the model does: output 0 differs by \S+ of its size; .*random"
    with pytest.raises(ExportError, match=message):
        export_transformer(Odd(kind).eval(), inputs)
    assert export_transformer(Odd(kind).eval(), inputs, check=False)(*inputs).shape == (2, WIDTH)


def test_every_output_is_compared():
    class Second(Odd):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return torch.arange(2), self.linear(x), super().forward(x)

    with pytest.raises(ExportError, match="output 2 differs"):
        export_transformer(Second("counting").eval(), (torch.randn(2, WIDTH),))


class Slightly(Odd):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * (1 + self.calls * (1e-2 if x.dtype == torch.bfloat16 else 3e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_like_rounding_passes(dtype):
    inputs = (torch.randn(2, WIDTH, dtype=dtype),)
    export_transformer(Slightly("").eval().to(dtype), inputs)


def test_a_model_on_the_meta_device_is_captured_without_running():
    with torch.device("meta"):
        model = Modulated().eval()
    inputs = tuple(x.to("meta") for x in sample(2))
    exported = export_transformer(model, inputs)
    assert [layer_name(node) for node in linears(exported)] == ["scale", "linear"]
    assert exported(*(x.to("meta") for x in sample(7))).shape == (7, 5, WIDTH)
    assert all(parameter.is_meta for parameter in exported.parameters())


class Lazy(nn.Module):
    """Builds its table in the first call and keeps it in an attribute, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(WIDTH, WIDTH), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(WIDTH).float().cos()
        return self.linear(x * self.table)


def test_a_table_built_in_the_first_call_stays_a_tensor():
    model, inputs = Lazy().eval(), (torch.randn(2, WIDTH),)
    exported = export_transformer(model, inputs)
    assert type(model.table) in (Tensor, type(None))
    assert torch.equal(model(*inputs), model.linear(inputs[0] * torch.arange(WIDTH).float().cos()))
    torch.testing.assert_close(exported(*inputs), model(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_names_are_the_same_in_any_dtype(model, dtype):
    model.to(dtype)
    exported = export_transformer(model, [x.to(dtype) for x in sample(2)])
    assert [node.target for node in placeholders(exported)] == ["tokens", "timestep"]
    assert {name: t.dtype for name, t in exported.state_dict().items()} == dict.fromkeys(model.state_dict(), dtype)
    assert exported(*[x.to(dtype) for x in sample(3)]).dtype == dtype


def test_autocast_does_not_reach_the_graph():
    model = Modulated().eval()
    with torch.autocast("cpu", torch.bfloat16):
        exported = export_transformer(model, sample(2))
    torch.testing.assert_close(exported(*sample(2)), model(*sample(2)))


def test_an_output_that_is_not_finite_is_refused():
    model = Modulated().eval()
    model.linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ExportError, match="output 0 of Modulated has NaN or infinite values on the example inputs"):
        export_transformer(model, sample(2))


def test_positional_arguments_of_any_kind():
    class Variadic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, /, *others: Tensor) -> Tensor:
            return self.linear(x) + sum(others)

    inputs = tuple(torch.randn(2, WIDTH) for _ in range(3))
    model = Variadic().eval()
    exported = export_transformer(model, inputs)
    assert [node.target for node in placeholders(exported)] == ["x", "input_1", "input_2"]
    torch.testing.assert_close(exported(*inputs), model(*inputs))


@pytest.mark.parametrize("dynamic", [None, ()])
def test_one_tensor_for_two_inputs_is_two_inputs(dynamic):
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, other_mask: Tensor) -> Tensor:
            return x * mask + other_mask

    mask = torch.ones(2, 5, 1)
    graph = export_transformer(Masked().eval(), (torch.zeros(2, 5, 3), mask, mask), dynamic=dynamic)
    x, one, other = torch.randn(2, 5, 3), torch.randn(2, 5, 1), torch.randn(2, 5, 1)
    assert torch.equal(graph(x, one, other), x * one + other)
