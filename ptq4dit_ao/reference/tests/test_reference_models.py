"""The shipped models' sizes, and the data that they are trained on."""

from __future__ import annotations

import gzip

import pytest
import torch

from ptq4dit_ao.calibration import as_denoiser
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.reference import FLOW, REFERENCES, load_reference_classifier, load_reference_dit
from ptq4dit_ao.reference import train as training
from ptq4dit_ao.reference.train import load_fashion, main


def write_idx(folder, pixels: bytes, labels: bytes, part="train"):
    for kind, header, data in (("images-idx3", bytes(16), pixels), ("labels-idx1", bytes(8), labels)):
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + data))


@pytest.mark.parametrize("name", REFERENCES)
def test_models_and_judges_fit_their_images(name):
    reference = REFERENCES[name]
    images = torch.zeros(2, 1, reference.size, reference.size)
    with torch.no_grad():
        denoiser = as_denoiser(load_reference_dit(name), reference.sampling)
        found = denoiser(images, torch.tensor([0, 999]), torch.tensor([3, 10]))
        assert found.shape == images.shape and found.isfinite().all()
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


@pytest.mark.parametrize("name", ["fashion", "flow"])
def test_training_on_fashion_asks_for_its_images(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--data", name])
    with pytest.raises(SystemExit):
        main()
    assert f"--data {name} needs --images" in capsys.readouterr().err


def test_training_that_was_interrupted_ends_as_if_it_had_not_been(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "sample_accuracy", lambda *_, **__: 0.0)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(8, 1, 28, 28, generator=generator), torch.arange(8)

    def train(folder, stop, **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = {"seed": 3, "steps": 4, "batch": 2} | changes
        nothing = torch.nn.Identity()
        return training.train(FLOW, images, labels, nothing, **settings, stop=stop, output=tmp_path / folder)

    whole = train("whole", 3).state_dict()
    train("parts", 1)
    train("parts", 3)
    parts = train("parts", 3).state_dict()  # nothing is left to do
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names == {"flow_training.pt", "flow_transformer.safetensors"}
    with pytest.raises(
        ArgumentError, match="flow_training.pt is of a run with .*'batch': 2}, not .*'batch': 1}; remove"
    ):
        train("parts", 4, batch=1)
    with pytest.raises(ArgumentError, match="flow_training.pt is at step 3, beyond 2; remove it"):
        train("parts", 2)
