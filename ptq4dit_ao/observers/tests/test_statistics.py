"""What calibration records: order-free, exact per timestep and channel, and refused where it is not finite."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.core import affine_qparams
from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.graph.names import layer_name, linears
from ptq4dit_ao.observers import (
    ChannelStatistics,
    InputObserver,
    RangeObserver,
    SalienceObserver,
    SalienceStatistics,
    TimestepClock,
)
from ptq4dit_ao.observers.qdq import QuantSpec
from ptq4dit_ao.observers.statistics import FORMAT
from ptq4dit_ao.passes import balance_result, fold_balance, insert_balance
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

many = settings(max_examples=50, deadline=None, derandomize=True)

CHANNELS = 3
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]

timesteps_ = st.sampled_from([0.0, 1.0, 20.0, 999.0, 0.125])
values_ = st.floats(-1e4, 1e4, width=32)


@st.composite
def batches(draw: st.DrawFn) -> list[Batch]:
    """Rows of (timesteps, minimum, maximum), the timesteps mixed within a batch."""
    result = []
    for _ in range(draw(st.integers(1, 5))):
        rows = draw(st.integers(1, 4))
        t = draw(hnp.arrays(np.float64, rows, elements=timesteps_))
        pair = draw(hnp.arrays(np.float32, (2, rows, CHANNELS), elements=values_))
        result.append((t, pair.min(0), pair.max(0)))
    return result


def statistics_of(parts: list[Batch]) -> ChannelStatistics:
    statistics = ChannelStatistics(CHANNELS)
    for part in parts:
        statistics.update(*(torch.from_numpy(array) for array in part))
    return statistics


def assert_equal(a: ChannelStatistics, b: ChannelStatistics) -> None:
    for what in ("timesteps", "minimum", "maximum", "salience"):
        assert torch.equal(getattr(a, what), getattr(b, what)), what


# One table


@many
@given(batches())
def test_statistics_are_the_extremes_of_each_timestep(parts):
    statistics = statistics_of(parts)
    t, low, high = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    distinct = np.unique(t)
    assert statistics.timesteps.tolist() == distinct.tolist()
    expected_low = np.stack([low[t == step].min(0) for step in distinct])
    expected_high = np.stack([high[t == step].max(0) for step in distinct])
    np.testing.assert_array_equal(statistics.minimum.numpy(), expected_low)
    np.testing.assert_array_equal(statistics.maximum.numpy(), expected_high)
    np.testing.assert_array_equal(statistics.salience.numpy(), np.maximum(abs(expected_low), abs(expected_high)))


@many
@given(batches(), st.randoms(use_true_random=False), st.integers(0, 5))
def test_neither_order_nor_partition_matters(parts, random, cut):
    shuffled = list(parts)
    random.shuffle(shuffled)
    first, second = statistics_of(shuffled[:cut]), statistics_of(shuffled[cut:])
    before = statistics_of(shuffled[cut:])
    first.merge(second)
    assert_equal(first, statistics_of(parts))
    assert_equal(second, before)


@many
@given(batches())
def test_merging_twice_changes_nothing(parts):
    statistics, again = statistics_of(parts), statistics_of(parts)
    statistics.merge(again)
    statistics.merge(again)
    assert_equal(statistics, again)


def test_nothing_seen_is_an_empty_table():
    statistics = ChannelStatistics(CHANNELS)
    assert statistics.channels == CHANNELS
    assert statistics.timesteps.tolist() == []
    assert statistics.salience.shape == (0, CHANNELS)
    statistics.merge(ChannelStatistics(CHANNELS))
    assert len(statistics.timesteps) == 0


def test_16_bit_rows_are_kept_in_float32():
    statistics = ChannelStatistics(2)
    rows = torch.tensor([[1.5, -3.0]], dtype=torch.bfloat16)
    statistics.update(torch.tensor([5]), rows, rows)
    assert statistics.minimum.dtype == torch.float32
    assert statistics.salience.tolist() == [[1.5, 3.0]]


def test_tables_of_different_widths_do_not_merge():
    with pytest.raises(CalibrationError, match="cannot merge statistics of 4 channels into 3; merge those of one"):
        ChannelStatistics(3).merge(ChannelStatistics(4))


# All tables of a model

ONE_BATCH: Batch = (np.array([3.0, 1.0]), np.full((2, CHANNELS), -2, np.float32), np.full((2, CHANNELS), 1, np.float32))


def model_statistics() -> SalienceStatistics:
    other = (np.array([1.0]), np.full((1, CHANNELS), -5, np.float32), np.full((1, CHANNELS), 0, np.float32))
    return SalienceStatistics({"blocks.0.mlp.fc1": statistics_of([ONE_BATCH]), "ff#2": statistics_of([other])})


def test_it_is_a_mapping_by_layer():
    statistics = model_statistics()
    assert list(statistics) == ["blocks.0.mlp.fc1", "ff#2"]
    assert len(statistics) == 2
    assert statistics["ff#2"].salience.tolist() == [[5.0] * CHANNELS]
    assert statistics.get("fc2") is None


def test_merging_models_merges_their_tables():
    statistics = model_statistics()
    more = (np.array([2.0]), np.full((1, CHANNELS), -9, np.float32), np.full((1, CHANNELS), 9, np.float32))
    statistics.merge(
        SalienceStatistics({"ff#2": statistics_of([more]), "blocks.0.mlp.fc1": ChannelStatistics(CHANNELS)})
    )
    assert statistics["ff#2"].timesteps.tolist() == [1.0, 2.0]
    assert_equal(statistics["blocks.0.mlp.fc1"], statistics_of([ONE_BATCH]))


def test_statistics_of_different_models_do_not_merge():
    other = SalienceStatistics({"ff#2": ChannelStatistics(CHANNELS), "proj": ChannelStatistics(CHANNELS)})
    with pytest.raises(CalibrationError, match=r"different models: 'blocks\.0\.mlp\.fc1' is in one of them only"):
        model_statistics().merge(other)


@many
@given(batches())
def test_a_saved_file_gives_back_every_number(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("statistics") / "salience.safetensors"
    saved = SalienceStatistics({"a.b": statistics_of(parts), "never/seen": ChannelStatistics(7)})
    saved.save(path)
    loaded = SalienceStatistics.load(path)
    assert list(loaded) == list(saved)
    for name, table in saved.items():
        assert_equal(loaded[name], table)
    assert loaded["never/seen"].channels == 7


TABLE = {"x/timesteps": torch.zeros(2).double(), "x/minimum": torch.zeros(2, 4), "x/maximum": torch.ones(2, 4)}


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({"weight": torch.zeros(3)}, id="another model's weights"),
        pytest.param({k: v for k, v in TABLE.items() if "maximum" not in k}, id="a missing tensor"),
        pytest.param(TABLE | {"x/minimum": torch.zeros(2)}, id="a vector for a table"),
        pytest.param(TABLE | {"x/minimum": torch.zeros(3, 4), "x/maximum": torch.ones(3, 4)}, id="too many rows"),
        pytest.param(TABLE | {"x/maximum": torch.ones(2, 5)}, id="too many channels"),
        pytest.param(TABLE | {"x/timesteps": torch.zeros(3).double()}, id="too many timesteps"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, tensors):
    path = tmp_path / "other.safetensors"
    FORMAT.write(path, tensors)
    with pytest.raises(
        CalibrationError, match=r"other\.safetensors holds no salience statistics .*run calibration again"
    ):
        SalienceStatistics.load(path)


@pytest.mark.parametrize("version", [1, 3])
def test_statistics_of_another_version_are_refused(tmp_path, version):
    path = tmp_path / "other.safetensors"
    dataclasses.replace(FORMAT, version=version).write(path, TABLE)
    message = rf"salience statistics of format version {version}, and this .* reads 2; run calibration again"
    with pytest.raises(CalibrationError, match=message):
        SalienceStatistics.load(path)


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file", "truncated"])
def test_a_corrupt_or_missing_file_is_refused(tmp_path, content):
    path = tmp_path / "salience.safetensors"
    if content == "truncated":
        model_statistics().save(path)
        path.write_bytes(path.read_bytes()[:-10])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(
        CalibrationError, match=r"cannot read salience statistics from .*salience\.safetensors: .*run calib"
    ):
        SalienceStatistics.load(path)


# The clock


def clock_at(timesteps: Tensor | None) -> TimestepClock:
    clock = TimestepClock()
    if timesteps is not None:
        InputObserver(clock, 0)(timesteps)
    return clock


@pytest.mark.parametrize(
    ("current", "batch", "rows"),
    [
        pytest.param(None, 3, [0, 0, 0], id="without a timestep input"),
        pytest.param(torch.tensor([7, 3]), 2, [7, 3], id="one each"),
        pytest.param(torch.tensor([[7.5], [3.0]]), 2, [7.5, 3.0], id="as a column"),
        pytest.param(torch.tensor(9), 3, [9, 9, 9], id="a single number"),
        pytest.param(torch.tensor([9]), 3, [9, 9, 9], id="broadcast"),
        pytest.param(torch.tensor([4, 4]), 6, [4] * 6, id="equal, more rows than samples"),
        pytest.param(torch.tensor([4, 4, 4]), 1, [4], id="equal, fewer rows than samples"),
        pytest.param(torch.tensor([1, 2]), 4, [1, 1, 2, 2], id="tokens beside the batch"),
        pytest.param(torch.tensor([[1, 8, 1], [2, 2, 5]]), 2, [8, 5], id="one for each token"),
        pytest.param(torch.tensor([2**24 + 1, 1]), 2, [2**24 + 1, 1], id="beyond float32"),
    ],
)
def test_every_row_has_its_timestep(current, batch, rows):
    result = clock_at(current).rows(batch, "fc1")
    assert result.dtype == torch.float64
    assert result.tolist() == rows


def test_rows_that_cannot_be_told_apart_are_refused():
    message = r"fc1: a tensor of 5 rows was computed from 2 samples with different timesteps; .*one timestep per batch"
    with pytest.raises(CalibrationError, match=message):
        clock_at(torch.tensor([1, 2])).rows(5, "fc1")


def test_the_timestep_passes_through_its_observer():
    t = torch.tensor([1, 2])
    assert InputObserver(TimestepClock(), 0)(t) is t


# Observers

SPEC = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False, channel_axis=None, eps=2**-12)


class NoHook:
    def before_convert(self, model: GraphModule) -> None: ...


def salience_observer(clock: TimestepClock) -> SalienceObserver:
    return SalienceObserver(SPEC, NoHook(), "blocks.0.mlp.fc1", clock, CHANNELS)


def range_observer(clock: TimestepClock) -> RangeObserver:
    return RangeObserver(SPEC, NoHook(), "blocks.0.mlp.fc1", clock)


@pytest.mark.parametrize("shape", [(4, CHANNELS), (4, 5, CHANNELS), (4, 2, 5, CHANNELS)])
def test_mixed_timesteps_in_one_batch_are_kept_apart(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([30, 10, 30, 20])
    observer = salience_observer(clock_at(t))
    assert observer(x) is x
    assert observer.statistics.timesteps.tolist() == [10, 20, 30]
    for row, step in enumerate((10, 20, 30)):
        tokens = x[t == step].reshape(-1, CHANNELS)
        assert torch.equal(observer.statistics.minimum[row], tokens.amin(0))
        assert torch.equal(observer.statistics.maximum[row], tokens.amax(0))
        assert torch.equal(observer.statistics.salience[row], tokens.abs().amax(0))


def test_the_samples_may_lie_along_another_axis():
    x = torch.randn(7, 2, CHANNELS, generator=torch.Generator().manual_seed(0))  # tokens first
    observer = SalienceObserver(SPEC, NoHook(), "fc1", clock_at(torch.tensor([30, 10])), CHANNELS, 1)
    observer(x)
    assert torch.equal(observer.statistics.maximum, torch.stack([x[:, 1].amax(0), x[:, 0].amax(0)]))


def test_what_all_samples_share_counts_at_every_timestep():
    x = torch.randn(7, CHANNELS, generator=torch.Generator().manual_seed(0))
    observer = SalienceObserver(SPEC, NoHook(), "fc1", clock_at(torch.tensor([30, 10, 30])), CHANNELS, None)
    observer(x)
    assert observer.statistics.timesteps.tolist() == [10, 30]
    assert torch.equal(observer.statistics.minimum, x.amin(0).expand(2, -1))


def test_a_timestep_without_axes_and_what_all_samples_share():
    observer = SalienceObserver(SPEC, NoHook(), "fc1", clock_at(torch.tensor(7.0)), CHANNELS, None)
    observer(torch.ones(5, CHANNELS))
    assert observer.statistics.timesteps.tolist() == [7]


def test_what_all_samples_share_may_be_broken():
    observer = SalienceObserver(SPEC, NoHook(), "fc1", clock_at(torch.tensor([1, 2, 3, 4])), CHANNELS, None)
    with pytest.raises(CalibrationError, match="the input of 'fc1' has NaN or infinite values, in 1 of 1 rows"):
        observer(torch.full((5, CHANNELS), math.nan))


def test_one_timestep_for_more_rows_than_samples():
    observer = salience_observer(clock_at(torch.tensor([5, 5])))
    observer(torch.ones(8, CHANNELS))  # tokens beside the batch
    assert observer.statistics.timesteps.tolist() == [5]


@pytest.mark.parametrize("make", [salience_observer, range_observer])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_layer_and_timestep(make, broken):
    x = torch.zeros(3, 4, CHANNELS)
    x[1, 2, 0] = broken
    observer = make(clock_at(torch.tensor([10, 20, 30])))
    message = r"the input of 'blocks\.0\.mlp\.fc1' has NaN or infinite values at timestep 20, in 1 of 3 rows"
    with pytest.raises(CalibrationError, match=message):
        observer(x)


def test_every_broken_timestep_is_named_in_order():
    x = torch.zeros(4, CHANNELS)
    x[[0, 1, 3]] = math.nan
    observer = salience_observer(clock_at(torch.tensor([30.0, 2.5, 7.0, 30.0])))
    with pytest.raises(CalibrationError, match=r"at timestep 2\.5, 30, in 3 of 4 rows"):
        observer(x)


def test_without_a_timestep_input_the_rows_are_named():
    with pytest.raises(CalibrationError, match=r"has NaN or infinite values, in 2 of 2 rows; look at that"):
        range_observer(TimestepClock())(torch.full((2, CHANNELS), math.inf))


def test_a_broken_sample_leaves_the_statistics_as_they_were():
    observer = salience_observer(clock_at(torch.tensor([1])))
    observer(torch.ones(1, CHANNELS))
    with pytest.raises(CalibrationError):
        observer(torch.full((1, CHANNELS), math.nan))
    assert observer.statistics.maximum.tolist() == [[1.0] * CHANNELS]


# Ranges after balancing


class Modulated(nn.Module):
    """A site behind a LayerNorm, ``linear``; ``head`` is none, a GELU stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.modulation, self.linear, self.head = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        condition = torch.cos(timestep[:, None] * torch.arange(1, 9, device=x.device))
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        x = self.linear(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        return self.head(nn.functional.gelu(x))


def samples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3, 6, 8, generator=generator), torch.randint(0, 1000, (3,), generator=generator).float())
        for _ in range(4)
    ]


@cache
def float_model() -> GraphModule:
    torch.manual_seed(0)
    model = Modulated()
    with torch.no_grad():
        model.linear.weight.mul_(torch.logspace(-1, 1, 8))  # columns of very different size
    return export_transformer(model.eval(), samples()[0])


def prepared(**kwargs: object) -> GraphModule:
    return prepare_pt2e(copy.deepcopy(float_model()), PTQ4DiTQuantizer(**kwargs))


LINEAR = {layer_name(node): node.name for node in linears(float_model())}["linear"]


def quantized_input(model: GraphModule) -> tuple[float, int]:
    """Scale and zero point of what ``linear`` reads."""
    (node,) = [node for node in model.graph.nodes if node.name == LINEAR]
    quantize = node.args[0].args[0]
    assert quantize.target is torch.ops.quantized_decomposed.quantize_per_tensor.default
    return quantize.args[1:3]


def float_range(model: GraphModule) -> tuple[Tensor, Tensor]:
    """Of what ``linear`` reads, over all samples."""
    seen: list[Tensor] = []

    class Recorder(Interpreter):
        def run_node(self, n: Node):
            if n.name == LINEAR:
                seen.append(self.env[n.args[0]].flatten())
            return super().run_node(n)

    with torch.no_grad():
        for sample in samples():
            Recorder(model).run(*sample)
    return torch.cat(seen).aminmax()


def calibrated(**kwargs: object) -> GraphModule:
    model = prepared(**kwargs)
    for sample in samples():
        model(*sample)
    return convert_pt2e(model)


def test_ranges_after_balancing_are_those_of_the_folded_float_model():
    converted = calibrated()
    ((name, outcome),) = balance_result(converted).outcomes.items()
    assert name == "linear"
    assert float(outcome.b.max() / outcome.b.min()) > 3  # or nothing is shown

    folded = copy.deepcopy(float_model())
    insert_balance(folded, outcome.site, outcome.b)
    fold_balance(folded, outcome.site, outcome.b)
    folded.recompile()
    scale, zero_point = affine_qparams(*float_range(folded), 0, 255)
    actual_scale, actual_zero_point = quantized_input(converted)
    assert actual_scale == pytest.approx(float(scale), rel=1e-5)
    assert actual_zero_point == int(zero_point)


def test_an_offset_is_subtracted_before_the_scale_divides():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.2])
    seen = ChannelStatistics(3)
    seen.update(torch.arange(20.0), x, x)
    scale, offset = torch.tensor([2.0, 4.0, 0.1]).double(), torch.tensor([-1.0, 3.0, 0.5]).double()
    low, high = seen.range(scale, offset)
    expected = (x - offset) / scale
    torch.testing.assert_close(torch.stack([low, high]), torch.stack([expected.min(), expected.max()]))


def test_without_balancing_the_range_is_the_observed_one():
    scale, zero_point = affine_qparams(*float_range(float_model()), 0, 255)
    assert quantized_input(calibrated(balance="none")) == (float(scale), int(zero_point))


def test_a_layer_that_never_ran_is_refused():
    with pytest.raises(
        CalibrationError, match="'linear' was never run: call the prepared model on calibration samples"
    ):
        convert_pt2e(prepared())
    with pytest.raises(CalibrationError, match="was never run: call the prepared model on calibration samples"):
        convert_pt2e(prepared(balance="none"))
