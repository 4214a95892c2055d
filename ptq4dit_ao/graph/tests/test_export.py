"""Capturing a model: the same function, the same names, the model untouched, and refusals that say why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao.errors import ExportError
from ptq4dit_ao.graph import export_transformer, find_sites
from ptq4dit_ao.graph.names import layer_name, linears, placeholders
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
    exported = export_transformer(model, sample(1), dynamic_batch=False)
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
    with pytest.raises(ExportError, match=r"Broken cannot be exported: \w+: .*data-dependent.*dynamic_batch=False"):
        export_transformer(Broken().eval(), (torch.randn(2, WIDTH),))


@pytest.mark.parametrize("error", [NotImplementedError("no such thing\nsecond line"), AssertionError()])
def test_whatever_the_model_raises_is_an_export_error(error):
    first_line = str(error).split("\n")[0]
    with pytest.raises(ExportError, match=f"Broken cannot be exported: {type(error).__name__}: {first_line}") as caught:
        export_transformer(Broken(error).eval(), (torch.randn(2, WIDTH),))
    assert "second line" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_training_mode_is_refused():
    with pytest.raises(ExportError, match=r"Modulated is in training mode; call \.eval\(\) before exporting it"):
        export_transformer(Modulated().train(), sample(2))


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
    with pytest.raises(ExportError, match="the same first axis, of at least 2, in every input") as caught:
        export_transformer(Modulated().eval(), inputs)
    assert all(str(tuple(x.shape)) in str(caught.value) for x in inputs)


def test_more_inputs_than_the_model_takes_are_refused():
    with pytest.raises(ExportError, match=r"Modulated takes 2 inputs \(tokens, timestep\), got 3"):
        export_transformer(Modulated().eval(), (*sample(2), torch.zeros(2)))


def test_too_few_inputs_are_refused():
    with pytest.raises(ExportError, match="Modulated cannot be exported: TypeError: .*missing 1 required"):
        export_transformer(Modulated().eval(), sample(2)[:1])


def test_a_batch_that_the_model_computes_with_can_be_made_static():
    class Listed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor([1.0] * x.shape[0])[:, None]

    with pytest.raises(ExportError, match="dynamic_batch=False may help"):
        export_transformer(Listed().eval(), (torch.zeros(2, 3),))
    exported = export_transformer(Listed().eval(), (torch.zeros(2, 3),), dynamic_batch=False)
    assert torch.equal(exported(torch.zeros(2, 3)), torch.ones(2, 3))
