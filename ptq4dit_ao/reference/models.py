"""Reference models: two small DiTs (adaLN-Zero, diffusers), each with the classifier that judges its samples.

* ``digits``: scikit-learn's digits (1797 real 8x8 grey images, UCI "Optical Recognition of Handwritten Digits").
* ``fashion``: Fashion-MNIST (60 000 training images of 28x28, arXiv 1708.07747).

Both are trained by :mod:`ptq4dit_ao.reference.train` and ship as float16 safetensors inside the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ptq4dit_ao._optional import require
from ptq4dit_ao.calibration import Sampling
from ptq4dit_ao.errors import check_choice

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

M = TypeVar("M")

NUM_CLASSES = 10
"""Number of classes of both models. The label ``NUM_CLASSES`` is the null label of classifier-free guidance."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Description of a reference DiT and its judge, except for their weights."""

    name: str
    data: str
    """Name of the training data."""
    size: int
    """Height and width of its grey images, in pixels."""
    patch: int
    pooled: tuple[int, ...]
    """Indices of the classifier's three convolutions that a 2x2 max pooling follows."""

    @property
    def config(self) -> dict[str, Any]:
        """Config of a ``DiTTransformer2DModel``: width 128, 6 adaLN-Zero blocks, (size / patch)^2 tokens."""
        return {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "in_channels": 1,
            "out_channels": 1,
            "num_layers": 6,
            "sample_size": self.size,
            "patch_size": self.patch,
            "num_embeds_ada_norm": NUM_CLASSES,
            "norm_type": "ada_norm_zero",
            "attention_bias": True,
        }

    @property
    def sampling(self) -> Sampling:
        """Sampling that the DiT was trained for: the linear DDPM schedule over 1000 timesteps, in pixels."""
        return Sampling(channels=1, size=self.size, null_label=NUM_CLASSES, clip=True)


DIGITS = Reference(name="digits", data="scikit-learn's digits", size=8, patch=2, pooled=(1,))
FASHION = Reference(name="fashion", data="Fashion-MNIST", size=28, patch=4, pooled=(0, 1))
REFERENCES = {reference.name: reference for reference in (DIGITS, FASHION)}

DIT_CONFIG = DIGITS.config
SAMPLING = DIGITS.sampling


class ImageClassifier(nn.Module):
    """Image classifier of three 3x3 convolutions and a linear head: (N, 1, size, size) in [-1, 1] -> (N, 10) logits."""

    def __init__(self, reference: Reference = DIGITS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate([(1, 32), (32, 64), (64, 64)]):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * (index in reference.pooled)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64 * (reference.size >> len(reference.pooled)) ** 2, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the images: (N, 1, size, size) -> (N, 10)."""
        return self.head(self.features(images).flatten(1))


def build_reference_dit(name: str = "digits") -> DiTTransformer2DModel:
    """Build an untrained reference DiT with 2.1 M parameters. Its training drops labels itself."""
    model = require("diffusers", extra="diffusers").DiTTransformer2DModel(**REFERENCES[name].config)
    for block in model.transformer_blocks:
        # In train mode each block would draw its own label-drop mask. Training drops the labels itself.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def load_reference_dit(name: str = "digits") -> DiTTransformer2DModel:
    """Load a trained reference DiT in float32 eval mode: ``model(x, timestep=t, class_labels=y).sample``.

    ``x`` is (N, 1, S, S) with S = 8 for ``digits`` and 28 for ``fashion``, ``t`` is (N,) in [0, 1000) of the linear
    DDPM schedule, and ``y`` is (N,) in [0, 10], where 10 is the null label. The result is the predicted noise, (N, 1,
    S, S).

    Raises:
        ArgumentError: there is no such model.
        MissingDependencyError: diffusers is not installed.
    """
    check_choice("name", name, tuple(REFERENCES))
    return _load(build_reference_dit(name), f"{name}_dit.safetensors")


def load_reference_classifier(name: str = "digits") -> ImageClassifier:
    """Load the classifier that judges samples, in float32 eval mode.

    Raises:
        ArgumentError: there is no such classifier.
    """
    check_choice("name", name, tuple(REFERENCES))
    return _load(ImageClassifier(REFERENCES[name]), f"{name}_classifier.safetensors")


def _load(model: M, name: str) -> M:
    data = files(__package__).joinpath("weights", name).read_bytes()
    assert isinstance(model, nn.Module)
    model.load_state_dict({k: v.to(torch.float32) for k, v in load_safetensors(data).items()})
    model.eval().requires_grad_(False)
    return model
