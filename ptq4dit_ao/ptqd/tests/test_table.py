"""A table says what it is for, and is read back as it was or not at all."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from safetensors.torch import save_file

from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.ptqd import NoiseCorrection
from ptq4dit_ao.ptqd.table import FORMAT


def doubles(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


TABLE = NoiseCorrection(
    timesteps=torch.tensor([900, 500, 0]),
    k=doubles(0.0, 0.25, 1.0),
    mu=doubles([0.0, 1.0], [2.0, -1.0], [0.5, 0.0]),
    sigma_q=doubles(0.1, 0.5, 0.0),
    guidance=1.5,
)


def test_noise_is_corrected_by_channel():
    eps = torch.randn(3, 2, 4, 5)
    expected = torch.stack([eps[:, 0] - 2, eps[:, 1] + 1], dim=1) / 1.25
    torch.testing.assert_close(TABLE.correct(eps, torch.tensor(500)), expected)
    torch.testing.assert_close(TABLE.correct(eps[..., 0, 0], 500), expected[..., 0, 0])
    assert TABLE.correct(eps.bfloat16(), 500).dtype == torch.bfloat16
    assert TABLE.remaining_variance(500) == pytest.approx(0.4**2)


def test_a_timestep_that_was_not_measured():
    message = r"has no timestep 400; it was fitted for 3 steps at 900, 500, 0: sample with these, or fit one"
    for call in (lambda: TABLE.correct(torch.zeros(1, 2), 400), lambda: TABLE.remaining_variance(400)):
        with pytest.raises(ArgumentError, match=message):
            call()
    long = NoiseCorrection(
        timesteps=torch.arange(100, 0, -1), k=torch.zeros(100).double(), mu=torch.zeros(100, 1).double(),
        sigma_q=torch.zeros(100).double(), guidance=1.0,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=r"fitted for 100 steps at 100, 99, 98, \.\.\., 1: "):
        long.correct(torch.zeros(1, 1), 0)


def test_other_channels():
    with pytest.raises(ArgumentError, match="the noise has 3 channels, its correction 2"):
        TABLE.correct(torch.zeros(1, 3, 4, 4), 900)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": doubles(0.0, -0.5, 0.0)}, r"k of a noise correction is -0\.5; it must be finite and not negative"),
        ({"mu": doubles([0.0], [torch.inf], [0.0])}, "mu of a noise correction is inf; it must be finite$"),
        ({"sigma_q": doubles(0.0, 0.0, torch.nan)}, "sigma_q of a noise correction is nan"),
        ({"timesteps": torch.tensor([5, 5, 0])}, r"occur once each, got \[5, 5, 0\]"),
        ({"timesteps": torch.tensor([5, 0])}, r"got timesteps \(2,\) torch\.int64, k \(3,\) torch\.float64"),
        ({"mu": doubles(0.0, 0.0, 0.0)}, r"mu \(T, C\).*; got .*mu \(3,\)"),
        ({"k": torch.zeros(3)}, r"k \(3,\) torch\.float32"),
        ({"guidance": torch.inf}, "guidance of a noise correction is inf"),
    ],
)
def test_values_that_no_measurement_gives(change, message):
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(TABLE, **change)


def test_a_table_comes_back_from_disk(tmp_path):
    path = tmp_path / "table.safetensors"
    TABLE.save(path)
    TABLE.save(str(path))  # replaces
    loaded = NoiseCorrection.load(path)
    for name in ("timesteps", "k", "mu", "sigma_q"):
        assert torch.equal(getattr(loaded, name), getattr(TABLE, name)), name
    assert loaded.guidance == 1.5 and loaded.steps == 3
    assert os.listdir(tmp_path) == ["table.safetensors"]


def test_a_failed_save_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "table.safetensors"
    path.write_text("old")

    def full(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CalibrationError, match=r"cannot write noise correction to .*table\.safetensors: disk full"):
        TABLE.save(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["table.safetensors"]


def test_files_that_hold_no_table(tmp_path):
    good = tmp_path / "good"
    TABLE.save(good)
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-5])
    for name in ("cut", "missing"):
        with pytest.raises(CalibrationError, match=rf"cannot read noise correction from .*{name}: "):
            NoiseCorrection.load(tmp_path / name)
    tensors = {name: getattr(TABLE, name) for name in ("timesteps", "k", "mu", "sigma_q")}
    about = {"guidance": "1.5"}
    save_file(tensors, tmp_path / "bad")
    with pytest.raises(CalibrationError, match="is not a noise correction file"):
        NoiseCorrection.load(tmp_path / "bad")
    for metadata, change, message in [
        (about, {"more": torch.zeros(1)}, "holds k, more, mu, sigma_q, timesteps; fit it again"),
        ({}, {}, r"is damaged \('guidance'\); fit it again"),
        (about, {"k": -TABLE.k}, r"is damaged \(k of a noise correction is -0\.25; .*\); fit it again"),
    ]:
        FORMAT.write(tmp_path / "bad", {**tensors, **change}, metadata)
        with pytest.raises(CalibrationError, match=message):
            NoiseCorrection.load(tmp_path / "bad")
