"""Feature networks, and the statistics of a reference set on disk."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.metrics import (
    FeatureNetwork,
    Features,
    Gaussian,
    ReferenceStatistics,
    extract,
    frechet_distance,
    inception_score,
    precision_recall,
)
from ptq4dit_ao.metrics.statistics import FORMAT


def read(images: Tensor) -> Features:
    """Nine channels of maps that say where they are from."""
    spatial = torch.cat([images + channel for channel in range(9)], dim=1)
    return Features(pooled=spatial.mean((2, 3)), spatial=spatial, probabilities=images.flatten(1)[:, :3].softmax(1))


NETWORK = FeatureNetwork(name="adder", read=read)


def images(n: int = 10, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 2, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def statistics() -> ReferenceStatistics:
    return ReferenceStatistics.of("adder", images(), extract(NETWORK, images()))


# -- extraction ------------------------------------------------------------------------------------------------------


def test_batches_are_put_together():
    seen = []
    features = extract(NETWORK, images(), batch_size=4, on_progress=lambda *n: seen.append(n))
    whole = extract(NETWORK, images())
    assert seen == [(4, 10), (8, 10), (10, 10)]
    for field in dataclasses.fields(Features):
        assert torch.equal(getattr(features, field.name), getattr(whole, field.name))


def test_spatial_features_are_the_first_seven_channels_position_by_position():
    features = extract(NETWORK, torch.full((1, 1, 2, 3), -1.0))
    assert features.spatial.tolist() == [[channel - 1.0 for channel in range(7)] * 6]
    assert features.pooled.shape == (1, 9)


def test_the_network_sees_256_levels():
    features = extract(NETWORK, torch.tensor([-2.0, -1.0, 0.001, 0.003, 1.0, 3.0]).reshape(6, 1, 1, 1))
    levels = (features.pooled[:, 0] + 1) * 127.5
    assert levels.tolist() == pytest.approx([0, 0, 128, 128, 255, 255], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spatial": torch.zeros(10, 9)}, r"returned spatial \(10, 9\) for 10 images; expected a tensor of 4 axes"),
        ({"pooled": torch.zeros(3, 9)}, r"returned pooled \(3, 9\) for 10 images; .* the first of them 10"),
        ({"probabilities": None}, "returned probabilities NoneType for 10 images"),
    ],
)
def test_a_network_that_returns_something_else(change, message):
    odd = FeatureNetwork(name="odd", read=lambda x: dataclasses.replace(read(x), **change))
    with pytest.raises(ArgumentError, match=f"feature network 'odd' {message}"):
        extract(odd, images())


@pytest.mark.parametrize(
    ("name", "expected"), [("Inception-2015-12-05", True), ("inception", True), ("not inception", False)]
)
def test_only_inception_is_inception(name, expected):
    assert FeatureNetwork(name=name, read=read).is_inception == expected


# -- statistics ------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_the_features():
    generated = extract(NETWORK, 0.2 * images(12, seed=1))
    real, distances = extract(NETWORK, images()), statistics().distances(generated)
    assert distances.frechet == frechet_distance(Gaussian.of(real.pooled), Gaussian.of(generated.pooled)) > 0
    assert distances.spatial_frechet == frechet_distance(Gaussian.of(real.spatial), Gaussian.of(generated.spatial)) > 0
    assert distances.inception_score == inception_score(generated.probabilities) > 1
    assert (distances.precision, distances.recall) == precision_recall(real.pooled, generated.pooled)
    assert distances.precision != distances.recall


def test_statistics_come_back_from_disk_to_the_bit(tmp_path):
    kept, path = statistics(), tmp_path / "kept.safetensors"
    kept.save(path)
    loaded = ReferenceStatistics.load(path)
    assert (loaded.network, loaded.checksum) == (kept.network, kept.checksum)
    for fit in ("pooled_fit", "spatial_fit"):
        one, other = getattr(kept, fit), getattr(loaded, fit)
        assert torch.equal(one.mean, other.mean) and torch.equal(one.covariance, other.covariance)
    assert torch.equal(kept.pooled, loaded.pooled)
    assert loaded.check("kept", "adder", images()) is loaded and loaded.check("kept", "adder") is loaded


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    statistics().save(path)
    before = path.read_bytes()

    def broken(tensors, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("ptq4dit_ao._formats.save_file", broken)
    with pytest.raises(ArgumentError, match=r"cannot write reference statistics to .*kept.safetensors: disk full"):
        statistics().save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_statistics_that_lack_a_tensor(tmp_path):
    path = tmp_path / "kept.safetensors"
    statistics().save(path)
    about, tensors = FORMAT.read(path)
    del tensors["spatial_mean"]
    FORMAT.write(path, tensors, about)
    with pytest.raises(ArgumentError, match=r"the reference statistics in .*kept\.safetensors lack 'spatial_mean'"):
        ReferenceStatistics.load(path)


def test_statistics_of_something_else():
    with pytest.raises(ArgumentError, match="kept is of the network 'adder', not of 'digits classifier'; use another"):
        statistics().check("kept", "digits classifier")
    changed = images()
    changed[3, 0, 1, 1] += 0.02
    with pytest.raises(ArgumentError, match="kept is of 10 other images than the 10 given; use another file"):
        statistics().check("kept", "adder", changed)


def test_files_that_hold_no_statistics(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot read reference statistics from .*missing"):
        ReferenceStatistics.load(tmp_path / "missing")
    save_file({"pooled": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ArgumentError, match="other is not a reference statistics file"):
        ReferenceStatistics.load(tmp_path / "other")
