"""The shipped models' sizes, and the data that they are trained on."""

from __future__ import annotations

import gzip

import pytest
import torch

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.reference import REFERENCES, load_reference_classifier, load_reference_dit
from ptq4dit_ao.reference.train import load_fashion, main


def write_idx(folder, pixels: bytes, labels: bytes, part="train"):
    for kind, header, data in (("images-idx3", bytes(16), pixels), ("labels-idx1", bytes(8), labels)):
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + data))


@pytest.mark.parametrize("name", REFERENCES)
def test_models_and_judges_fit_their_images(name):
    reference = REFERENCES[name]
    images = torch.zeros(2, 1, reference.size, reference.size)
    with torch.no_grad():
        noise = load_reference_dit(name)(images, timestep=torch.tensor([0, 999]), class_labels=torch.tensor([3, 10]))
        assert noise.sample.shape == images.shape and noise.sample.isfinite().all()
        assert load_reference_classifier(name)(images).shape == (2, 10)


def test_fashion_images_are_read(tmp_path):
    write_idx(tmp_path, bytes([0, 255]) + bytes(784 - 2) + bytes([51]) * 784, bytes([9, 4]))
    images, labels = load_fashion(tmp_path)
    assert images.shape == (2, 1, 28, 28) and labels.tolist() == [9, 4]
    assert images[0, 0, 0, :3].tolist() == [-1.0, 1.0, -1.0] and images[1].unique().tolist() == pytest.approx([-0.6])


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot read Fashion-MNIST from .* \(--images\)"):
        load_fashion(tmp_path)
    write_idx(tmp_path, bytes(784), bytes(2))
    with pytest.raises(ArgumentError, match="train-images-idx3-ubyte.gz does not hold 2 images of 28 x 28"):
        load_fashion(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    for damaged in (b"no gzip", labels.read_bytes()[:-5]):
        labels.write_bytes(damaged)
        with pytest.raises(ArgumentError, match="cannot read Fashion-MNIST"):
            load_fashion(tmp_path)


def test_training_on_fashion_asks_for_its_images(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--data", "fashion"])
    with pytest.raises(SystemExit):
        main()
    assert "--data fashion needs --images" in capsys.readouterr().err
