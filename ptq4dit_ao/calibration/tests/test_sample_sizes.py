"""Samples of several sizes: their rows, batches and files, and how a pipeline is asked for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao.calibration import CalibrationSamples, NormalTimesteps, collect_from_pipeline
from ptq4dit_ao.calibration.group import apportioned
from ptq4dit_ao.calibration.samples import FORMAT
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.testing.zoo import FAMILIES


class Denoiser(nn.Module):
    def forward(
        self, x: Tensor, timestep: Any = None, ids: Any = None, mode: Any = None, return_dict: bool = True
    ) -> Tensor:
        return x


def of_size(rows: int, width: int, start: int = 0, mode: object = None) -> CalibrationSamples:
    """Rows numbered from ``start``, whose timesteps are 0 to 3 in turn, with ids of their width."""
    number = torch.arange(start, start + rows)
    x = number[:, None].expand(rows, width).float()
    arguments = {"x": x, "timestep": number % 4, "ids": torch.arange(width), "mode": mode}
    signature, tensors = flatten_call(Denoiser(), arguments)
    shared = {"ids": tensors.pop("ids")}
    return CalibrationSamples(tensors, shared, signature)


@pytest.fixture
def samples() -> CalibrationSamples:
    """Twelve rows of width 6, and six of width 5."""
    return CalibrationSamples.joined([of_size(12, 6), of_size(6, 5, start=12)])


def numbers(batches: Iterable[tuple[Tensor, ...]]) -> list[int]:
    return [int(n) for x, *_ in batches for n in x[:, 0]]


def assert_equal(one: CalibrationSamples, other: CalibrationSamples) -> None:
    assert one.signature == other.signature
    for first, second in zip(one.batches(4), other.batches(4), strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


# -- one object ------------------------------------------------------------------------------------------------------


def test_every_batch_has_one_size_and_every_row_is_in_one(samples):
    assert len(samples) == 18 and [len(group) for group in samples.groups] == [12, 6]
    batches = list(samples.batches(4))
    assert len(batches) == samples.num_batches(4) == 5
    assert all(torch.equal(ids, torch.arange(x.shape[1])) for x, _, ids in batches)
    assert sorted(numbers(batches)) == list(range(18))
    assert [x.shape for x, *_ in batches if x.shape[1] == 5] == [(4, 5), (2, 5)]


def test_batches_of_sizes_alternate(samples):
    widths = [x.shape[1] for x, *_ in samples.batches(1)]
    for start in range(0, 18, 3):
        assert Counter(widths[start : start + 3]) == {6: 2, 5: 1}, widths


def test_samples_of_one_size_are_one_group():
    first, second = of_size(3, 6), of_size(4, 6, start=3)
    joined = CalibrationSamples.joined([first, second])
    assert joined.inputs["x"][:, 0].tolist() == list(range(7)) and list(joined.shared) == ["ids"]
    (group,) = first.groups
    assert_equal(group, first)


def test_equal_shapes_with_other_shared_tensors_are_two_sizes():
    first, second = of_size(3, 6), of_size(3, 6)
    moved = CalibrationSamples(second.inputs, {"ids": torch.arange(6) + 1}, second.signature)
    joined = CalibrationSamples.joined([first, moved])
    assert [ids[0].item() for _, _, ids in joined.batches(3)] == [0, 1]


def test_inputs_of_several_sizes_are_taken_from_the_groups(samples):
    for name in ("inputs", "shared"):
        with pytest.raises(CalibrationError, match=f"these samples have 2 sizes, and {name} is of samples of one size"):
            getattr(samples, name)


def test_timesteps_of_all_sizes(samples):
    assert sorted(samples.timesteps.tolist()) == sorted(float(n % 4) for n in range(18))
    found = [(t.unique().tolist(), x.shape[1]) for x, t, _ in samples.by_timestep()]
    assert found == [([t], width) for t in range(4) for width in (6, 5)]
    assert sorted(numbers(samples.by_timestep())) == list(range(18))


def test_a_part_has_both_sizes_and_all_timesteps(samples):
    for rows, shares in ((1, (1,)), (2, (1, 1)), (3, (2, 1)), (9, (6, 3)), (100, (12, 6))):
        part = samples.spread(rows)
        assert tuple(map(len, part.groups)) == shares
        assert len(set(numbers(part.batches(5)))) == min(rows, 18)
    even = CalibrationSamples.joined([of_size(8, 6), of_size(8, 5)]).spread(4)
    assert sorted(even.timesteps.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("total", "counts", "shares"),
    [
        (3, [9], [3]),
        (4, [100, 1, 1], [2, 1, 1]),
        (2, [1, 5, 3], [0, 1, 1]),
        (7, [2, 2, 2], [2, 2, 2]),
        (5, [4, 1], [4, 1]),
    ],
)
def test_shares_are_in_proportion_and_at_least_one(total, counts, shares):
    assert apportioned(total, counts) == shares


def test_shuffling_keeps_sizes_apart(samples):
    shuffled = samples.shuffled(0)
    assert sorted(numbers(shuffled.batches(3))) == list(range(18))
    assert numbers(shuffled.batches(3)) != numbers(samples.batches(3))
    assert_equal(shuffled, samples.shuffled(0))


def test_an_example_has_enough_rows_and_no_shared_tensor_of_as_many():
    samples = CalibrationSamples.joined([of_size(1, 4), of_size(9, 3), of_size(5, 5)])
    assert samples.example(2)["x"].shape == (2, 3)
    assert samples.example(3)["x"].shape == (3, 5)  # there are 3 ids of width 3
    assert samples.example(50)["x"].shape == (9, 3)


def test_both_sizes_go_to_a_device(samples):
    assert {x.device.type for batch in samples.on(torch.device("meta")).batches(4) for x in batch} == {"meta"}


def test_samples_that_do_not_fit_together():
    def joined(other: object) -> None:
        CalibrationSamples.joined([of_size(2, 6), other])

    plain = of_size(2, 5)
    table, shared, signature = plain.inputs, plain.shared, plain.signature
    with pytest.raises(CalibrationError, match="there are no calibration samples to join"):
        CalibrationSamples.joined([])
    with pytest.raises(ArgumentError, match=r"a part is of type dict; give what collect"):
        joined({})
    with pytest.raises(CalibrationError, match="argument 'mode' is None in one call and 2 in another"):
        joined(of_size(2, 5, mode=2))
    with pytest.raises(CalibrationError, match="some of the samples have a signature, and others have none"):
        joined(CalibrationSamples(table, shared))
    with pytest.raises(CalibrationError, match=r"'x' is \(2, 6\) float32 in one call and \(2, 5\) float64 in another"):
        joined(CalibrationSamples({**table, "x": table["x"].double()}, shared, signature))
    with pytest.raises(CalibrationError, match=r"input 'ids' has rows in some of the samples only; record all of them"):
        joined(CalibrationSamples({**table, "ids": torch.arange(2)}, {}, signature))


# -- files -----------------------------------------------------------------------------------------------------------


def test_all_sizes_come_back_from_disk(samples, tmp_path):
    samples.save(tmp_path / "samples")
    assert_equal(CalibrationSamples.load(tmp_path / "samples"), samples)


def test_a_file_of_version_2_is_read(tmp_path):
    samples = of_size(4, 6)
    samples.save(tmp_path / "new")
    metadata, tensors = FORMAT.read(tmp_path / "new")
    assert metadata.pop("format") == "ptq4dit-ao calibration samples 3"
    earlier = type(FORMAT)(name=FORMAT.name, version=2, error=FORMAT.error, remedy=FORMAT.remedy)
    earlier.write(tmp_path / "old", tensors, metadata)
    assert_equal(CalibrationSamples.load(tmp_path / "old"), samples)
    with pytest.raises(CalibrationError, match="format version 3, and this version of ptq4dit-ao reads 2"):
        earlier.read(tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "name"),
    [({"sizes": "1"}, "0/x"), ({"sizes": "two"}, "0/x"), ({"inputs": "x,y"}, "0/x"), ({}, "x"), ({}, "-1/x")],
)
def test_a_damaged_file_of_sizes(change, name, samples, tmp_path):
    samples.save(tmp_path / "samples")
    metadata, tensors = FORMAT.read(tmp_path / "samples")
    tensors[name] = tensors.pop("0/x")
    FORMAT.write(tmp_path / "samples", tensors, metadata | change)
    with pytest.raises(CalibrationError, match="are damaged .*; record them again"):
        CalibrationSamples.load(tmp_path / "samples")


# -- recording -------------------------------------------------------------------------------------------------------


class Painter:
    """A pipeline of images (rows, 1, width), with ids that depend on the size, and a text as long as the longest."""

    def __init__(self) -> None:
        self.transformer = Denoiser()
        self.given: list[tuple[list[str], int]] = []

    def __call__(
        self, prompt: Any = None, width: int = 4, turned: bool = False, generator: torch.Generator | None = None
    ) -> None:
        self.given.append((prompt, width))
        rows = len(prompt or [""])
        for t in (9.0, 5.0, 1.0):
            x = torch.randn(rows, 1, width, generator=generator)
            ids = torch.arange(width) - int(turned)
            self.transformer(x, timestep=torch.tensor(t), ids=ids)


def record(prompts: Any, pipeline: Any = None, **options: Any) -> CalibrationSamples:
    return collect_from_pipeline(pipeline or Painter(), prompts, **{"timesteps": 2, "steps": 3, **options})


WIDTHS = [{"width": 8}, {"width": 6}]


def test_prompts_take_the_sizes_in_turn():
    pipeline, progress = Painter(), []
    samples = record(list("abcde"), pipeline, sizes=WIDTHS, batch_size=2, on_progress=lambda *at: progress.append(at))
    assert pipeline.given == [(["a", "c"], 8), (["e"], 8), (["b", "d"], 6)]
    assert [(len(group), group.inputs["x"].shape[2]) for group in samples.groups] == [(6, 8), (4, 6)]
    assert [group.shared["ids"].tolist() for group in samples.groups] == [list(range(8)), list(range(6))]
    assert progress[-1] == (9, 9)


def test_a_call_in_hand_is_made_at_every_size():
    pipeline = Painter()
    samples = record(None, pipeline, sizes=[{}, *WIDTHS], call={"prompt": ["a"]})
    assert pipeline.given == [(["a"], 4), (["a"], 8), (["a"], 6)] and len(samples.groups) == 3


def test_sizes_of_equal_shapes_are_told_apart_by_what_they_share():
    samples = record(["a", "b"], sizes=[{"width": 6}, {"width": 6, "turned": True}])
    assert [group.shared["ids"][0].item() for group in samples.groups] == [0, -1]
    with pytest.raises(CalibrationError, match="input 'ids' differs from call to call, but its first axis is not"):
        record(["a"], Turning(), sizes=WIDTHS[:1])


class Turning(Painter):
    """Ids that differ from step to step at one size."""

    def __call__(self, prompt: Any = None, width: int = 4) -> None:
        for t in (9.0, 5.0, 1.0):
            self.transformer(torch.zeros(2, 1, width), timestep=torch.tensor(t), ids=torch.arange(width) + int(t))


def test_each_prompt_has_draws_of_its_own_at_its_size():
    draws = NormalTimesteps(count=8)
    samples = record(list("abcd"), sizes=WIDTHS, timesteps=draws, seed=3, batch_size=1)
    dealt = draws.deal(4, 3, 3)
    for index, group in enumerate(samples.groups):
        expected = sorted((9.0, 5.0, 1.0)[p] for prompt in (index, index + 2) for p in dealt[prompt])
        assert sorted(group.inputs["timestep"].tolist()) == expected


def test_a_value_for_the_batch_has_one_role_at_all_sizes():
    """It changes from call to call at one size, and occurs once at the other."""

    class Scaled(Painter):
        def __call__(self, prompt: Any = None, width: int = 4) -> None:
            for t in (9.0, 5.0, 1.0):
                x = torch.zeros(len(prompt), 1, width)
                self.transformer(x, timestep=torch.tensor(t), ids=torch.tensor([t if width == 8 else 2.0]))

    first, second = record(["a", "b", "c"], Scaled(), sizes=WIDTHS).groups
    assert first.inputs["ids"].tolist() == [9.0, 9.0, 1.0, 1.0] and second.inputs["ids"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": []}, "sizes is empty; give at least one, or None for the pipeline's own size"),
        ({"sizes": 3}, r"sizes is 3 \(int\); give a list of dicts of arguments of the pipeline"),
        ({"sizes": [{"width": 8}, 6]}, r"a size is 6 \(int\); give a dict of arguments of the pipeline, such as"),
        ({"sizes": WIDTHS, "call": {"width": 4}}, "'width' is in call and in sizes; leave it out of one of them"),
        ({"sizes": [{"length": 4}]}, "sizes has 'length', which Painter does not take; it takes prompt, width"),
        ({"sizes": [{"prompt": ["a"]}]}, "'prompt' is in sizes, and prompts are given, too"),
        ({"sizes": [*WIDTHS, {}]}, "there are 3 sizes and 2 prompts, and each prompt has one size; give at least as"),
    ],
)
def test_sizes_that_cannot_be_asked_for(options, message):
    pipeline = Painter()
    with pytest.raises(ArgumentError, match=message):
        record(["a", "b"], pipeline, **options)
    assert pipeline.given == []


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_pipeline_of_diffusers_at_two_sizes(name):
    model, flow = FAMILIES[name].model(), diffusers.FlowMatchEulerDiscreteScheduler
    pipeline: Any = (
        diffusers.StableDiffusion3Pipeline(model, flow(shift=3.0), *[None] * 7)
        if name == "sd3"
        else diffusers.FluxPipeline(flow(use_dynamic_shifting=True), *[None] * 5, model)
    )
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt_embeds": torch.randn(2, 7, 24), "pooled_prompt_embeds": torch.randn(2, 16)}
    sizes = [{"height": 64, "width": 64}, {"height": 32, "width": 96}, {"height": 96, "width": 32}]
    samples = collect_from_pipeline(pipeline, None, timesteps=2, steps=3, guidance=1.0, call=call, sizes=sizes)
    assert [len(group) for group in samples.groups] == [4, 4, 4]
    for batch in samples.batches(2):
        assert model(**samples.signature.bind(batch)).sample.isfinite().all()
