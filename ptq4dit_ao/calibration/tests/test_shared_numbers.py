"""Samples of calls with numbers that are sizes: shared by all rows, whatever their length."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from ptq4dit_ao.calibration import CalibrationSamples, NormalTimesteps, collect_from_pipeline
from ptq4dit_ao.calibration.joining import RecordedCall, join_calls
from ptq4dit_ao.calibration.samples import FORMAT
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.interface import free_sizes
from ptq4dit_ao.capture.signature import flatten_call


class Sized(nn.Module):
    def forward(self, tokens: Tensor, timestep: Any = None, height: int = 4, width: int = 4, scale: int = 1) -> Tensor:
        return (tokens.unflatten(1, (height, width)) * scale).flatten(1, 2)


def called(height: int, width: int) -> dict[str, Any]:
    return {"tokens": torch.randn(3, height * width, 8), "height": height, "width": width}


def recorded(*calls: dict[str, Any]) -> CalibrationSamples:
    return join_calls([RecordedCall(0.0, 0, *flatten_call(Sized(), call)) for call in calls])


def test_numbers_are_shared_whatever_their_length():
    samples = recorded(called(3, 4), called(3, 4))  # 3 is the batch, too
    assert list(samples.inputs) == ["tokens"] and list(samples.shared) == ["height", "width"]
    assert [tuple(x.shape) for x in next(samples.batches(2))] == [(2, 12, 8), (3,), (4,)]
    example = samples.example(3)
    assert isinstance(example, dict) and (example["height"], example["width"]) == (3, 4)


def test_numbers_given_as_inputs_become_shared():
    signature, tensors = flatten_call(Sized(), called(4, 6))
    samples = CalibrationSamples(tensors, signature=signature)
    assert list(samples.inputs) == ["tokens"] and list(samples.shared) == ["height", "width"]


def test_calls_of_two_sizes_become_groups():
    samples = recorded(called(4, 6), called(6, 4))
    assert [len(group.shared["height"]) for group in samples.groups] == [4, 6]


def test_samples_come_back_from_disk(tmp_path):
    samples = recorded(called(4, 6))
    samples.save(tmp_path / "samples")
    again = CalibrationSamples.load(tmp_path / "samples")
    assert again.signature == samples.signature
    assert [tuple(x.shape) for x in next(again.batches(2))] == [(2, 24, 8), (4,), (6,)]


def test_samples_of_an_earlier_version_have_sizes_for_their_numbers(tmp_path):
    signature = {"tokens": {"tensor": "tokens"}, "height": 4, "width": 6, "scale": 3}
    FORMAT.write(
        tmp_path / "samples", {"tokens": torch.ones(3, 24, 8)}, {"inputs": "tokens", "signature": json.dumps(signature)}
    )
    samples = CalibrationSamples.load(tmp_path / "samples")
    assert [tuple(x.shape) for x in next(samples.batches(2))] == [(2, 24, 8), (4,), (6,)]
    model = Sized().eval()
    graph = export_transformer(model, samples.example(2))
    assert set(free_sizes(graph).names) == {"batch", "height", "width"}
    graph(*next(samples.batches(3)))


class Pipeline:
    """Calls its transformer with as many rows, two for each prompt, as the height says."""

    def __init__(self) -> None:
        self.transformer = Sized()

    def __call__(self, prompt: list[str], generator: torch.Generator) -> None:
        for t in (9.0, 7.0, 5.0, 3.0, 1.0):
            rows = 2 * len(prompt)
            tokens = torch.randn(rows, 4 * 6, 8, generator=generator)
            self.transformer(tokens, timestep=torch.full((rows,), t), height=4, width=6)


def test_drawn_steps_and_selections_of_rows_leave_numbers_alone():
    options: dict[str, Any] = {"steps": 5, "batch_size": 2, "guidance": None}
    samples = collect_from_pipeline(Pipeline(), ["a", "b"] * 2, timesteps=NormalTimesteps(count=9), **options)
    assert list(samples.inputs) == ["tokens", "timestep"] and len(samples) == 18
    for some in (samples, samples.spread(4), samples.shuffled(0)):
        assert [len(x) for x in some.shared.values()] == [4, 6]
