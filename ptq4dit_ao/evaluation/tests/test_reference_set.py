"""Real images from files, their statistics kept in one, and feature networks by name."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.feature_networks import load_features
from ptq4dit_ao.evaluation.reference_set import ReferenceSet, read_reference, reference_features
from ptq4dit_ao.metrics import FeatureNetwork, Features, ReferenceStatistics, extract
from ptq4dit_ao.reference import load_reference_classifier

LEVELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def expected(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels.transpose(0, 3, 1, 2) / 127.5 - 1).float()


def read(images: Tensor) -> Features:
    pooled = images.mean((2, 3))
    return Features(pooled=pooled, spatial=images, probabilities=pooled.softmax(1))


# -- images ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_colour_images(tmp_path):
    for i in (3, 1, 4, 0, 2):
        Image.fromarray(LEVELS[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = read_reference(tmp_path)
    assert found.name == tmp_path.name and torch.allclose(found.images, expected(LEVELS), atol=1e-6)


def test_a_folder_of_grey_images(tmp_path):
    for i in range(5):
        Image.fromarray(LEVELS[i, :, :, 0]).save(tmp_path / f"{i}.png")
    images = read_reference(tmp_path).images
    assert images.shape == (5, 1, 6, 4) and torch.allclose(images, expected(LEVELS[..., :1]), atol=1e-6)


def test_an_npz_like_those_of_adm(tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=LEVELS)
    found = read_reference(str(tmp_path / "real.npz"))
    assert (found.name, found.fits) == ("real.npz", None) and torch.allclose(found.images, expected(LEVELS), atol=1e-6)
    np.savez(tmp_path / "grey.npz", arr_0=LEVELS[..., 0])
    assert read_reference(tmp_path / "grey.npz").images.shape == (5, 1, 6, 4)


def test_fits_in_an_npz_are_for_inception_alone(tmp_path):
    fits = {"mu": np.full(3, 0.5), "sigma": np.eye(3), "mu_s": np.full(72, 0.25), "sigma_s": 2 * np.eye(72)}
    np.savez(tmp_path / "adm.npz", arr_0=LEVELS, **fits)
    found = read_reference(tmp_path / "adm.npz")
    inception = reference_features(found, FeatureNetwork(name="Inception", read=read)).statistics
    assert inception.pooled_fit.mean.tolist() == [0.5] * 3 and inception.pooled_fit.covariance.trace() == 3
    assert inception.spatial_fit.mean.tolist() == [0.25] * 72 and inception.spatial_fit.covariance.trace() == 144
    other = reference_features(found, FeatureNetwork(name="other", read=read)).statistics
    assert torch.allclose(other.pooled_fit.mean.float(), expected(LEVELS).mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": LEVELS}, "has no array 'arr_0' of images; write it with numpy.savez"),
        ({"arr_0": LEVELS / 255}, r"holds float64 of shape \(5, 6, 4, 3\); expected uint8 and \(N, H, W, C\)"),
        ({"arr_0": np.array([object()])}, "cannot read reference images from .*allow_pickle"),
    ],
)
def test_an_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ArgumentError, match=message):
        read_reference(tmp_path / "odd.npz")


def test_what_holds_no_images(tmp_path):
    with pytest.raises(ArgumentError, match=r"holds 0 PNG of sizes \[\]; expected images of one size"):
        read_reference(tmp_path)
    Image.fromarray(LEVELS[0]).save(tmp_path / "0.png")
    Image.fromarray(LEVELS[0, :5]).save(tmp_path / "1.png")
    with pytest.raises(ArgumentError, match=r"holds 2 PNG of sizes \[\(5, 4, 3\), \(6, 4, 3\)\]"):
        read_reference(tmp_path)
    with pytest.raises(ArgumentError, match="real.jpg is neither a folder of PNG, nor .npz, nor .safetensors"):
        read_reference(tmp_path / "real.jpg")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ArgumentError, match="cannot read reference images from .*text.npz"):
        read_reference(tmp_path / "text.npz")


# -- statistics ------------------------------------------------------------------------------------------------------


def test_a_cache_spares_the_network(tmp_path):
    cache, seen = tmp_path / "kept.safetensors", []
    real = ReferenceSet(name="real", images=expected(LEVELS))
    counting = FeatureNetwork(name="mean", read=lambda images: seen.append(len(images)) or read(images))
    first, second = (reference_features(real, counting, cache) for _ in range(2))
    assert seen == [5] and first.name == second.name == "real"
    generated = real.images.flip(3) * 0.5
    assert first.distances(generated) == second.distances(generated)
    kept = read_reference(cache)
    assert isinstance(kept, ReferenceStatistics) and kept.checksum == first.statistics.checksum
    with pytest.raises(ArgumentError, match="kept.safetensors is of the network 'mean', not of 'other'"):
        reference_features(real, FeatureNetwork(name="other", read=read), cache)
    with pytest.raises(ArgumentError, match="kept.safetensors is of 5 other images than the 4 given"):
        reference_features(ReferenceSet(name="real", images=real.images[1:]), counting, cache)


# -- networks --------------------------------------------------------------------------------------------------------


def test_the_digits_classifier_as_a_feature_network():
    network, classifier = load_features("digits"), load_reference_classifier()
    images = (torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round() / 127.5 - 1
    features = extract(network, images)
    assert network.name == "digits classifier" and not network.is_inception
    assert torch.allclose(features.probabilities, classifier(images).softmax(1), atol=1e-5)
    maps = classifier.features(images)
    assert torch.allclose(features.pooled, maps.mean((2, 3)), atol=1e-5) and features.pooled.shape == (6, 64)
    assert torch.allclose(features.spatial, maps[:, :7].permute(0, 2, 3, 1).flatten(1), atol=1e-5)


def test_the_digits_classifier_reads_digits():
    message = "the digits classifier reads images of 1 x 8 x 8, got 3 x 8 x 8; give another feature network"
    with pytest.raises(ArgumentError, match=message):
        extract(load_features("digits"), torch.zeros(2, 3, 8, 8))


def test_a_network_of_the_users(tmp_path, monkeypatch):
    module = "from ptq4dit_ao.metrics import FeatureNetwork as F\n\ndef mine():\n    return F(name='mine', read=abs)\n"
    (tmp_path / "networks_of_a_user.py").write_text(module + "\ndef number():\n    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_features("networks_of_a_user:mine").name == "mine"
    with pytest.raises(ArgumentError, match="networks_of_a_user:number returned a int; expected a ptq4dit_ao"):
        load_features("networks_of_a_user:number")
    with pytest.raises(ArgumentError, match="'networks_of_a_user:yours' cannot be loaded: .*no attribute 'yours'"):
        load_features("networks_of_a_user:yours")
    sys.modules.pop("networks_of_a_user")


@pytest.mark.parametrize("spec", ["inception", "path/to/weights.pt", "a b:c"])
def test_networks_that_are_not(spec):
    with pytest.raises(
        ArgumentError, match=f"network '{spec}' is none of 'digits', 'fashion', 'flow', 'package.module"
    ):
        load_features(spec)
