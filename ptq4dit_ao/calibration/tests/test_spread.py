"""A part of recorded samples, and their batches by timestep."""

from __future__ import annotations

import torch

from ptq4dit_ao.calibration import CalibrationSamples

T = torch.tensor([0, 0, 0, 0, 500, 500, 500, 500, 900, 900, 900, 900])


def samples(t: torch.Tensor = T) -> CalibrationSamples:
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    return CalibrationSamples({"x": torch.arange(len(t))[order], "timestep": t[order]})


def test_a_part_has_as_many_rows_of_each_timestep():
    for rows in (3, 6):
        part = samples().spread(rows)
        assert part.timesteps.tolist() == sorted([0, 500, 900] * (rows // 3))
        assert torch.equal(T[part.inputs["x"]], part.inputs["timestep"])
    assert samples().spread(1).timesteps.tolist() == [500]


def test_no_more_rows_than_there_are():
    assert sorted(samples().spread(100).inputs["x"].tolist()) == list(range(12))


def test_batches_by_timestep():
    batches = list(samples().by_timestep())
    assert [t.unique().tolist() for _, t in batches] == [[0], [500], [900]]
    assert sorted(torch.cat([x for x, _ in batches]).tolist()) == list(range(12))


def test_of_a_timestep_for_each_token_the_largest_counts():
    per_token = torch.stack([torch.zeros(12), T], dim=1)
    found = CalibrationSamples({"timestep": per_token})
    assert found.timesteps.tolist() == T.tolist() and len(list(found.by_timestep())) == 3


def test_samples_without_a_timestep_are_one_batch():
    (batch,) = CalibrationSamples({"x": torch.arange(5)}).by_timestep()
    assert batch[0].tolist() == [0, 1, 2, 3, 4]
