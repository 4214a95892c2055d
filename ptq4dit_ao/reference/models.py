"""The reference models: a digits DiT (adaLN-Zero, diffusers) and the classifier that judges its samples.

Both are trained by :mod:`ptq4dit_ao.reference.train` on scikit-learn's digits (1797 real 8x8 grey images,
UCI "Optical Recognition of Handwritten Digits") and ship as float16 safetensors inside the package.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ptq4dit_ao._optional import require
from ptq4dit_ao.calibration import Sampling

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

M = TypeVar("M")

NUM_CLASSES = 10
"""Digit classes; label ``NUM_CLASSES`` is the null label of classifier-free guidance."""
IMAGE_SIZE = 8

DIT_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "sample_size": IMAGE_SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": NUM_CLASSES,
    "norm_type": "ada_norm_zero",
    "attention_bias": True,
}

SAMPLING = Sampling(channels=1, size=IMAGE_SIZE, null_label=NUM_CLASSES, clip=True)
"""How the DiT was trained to be sampled: the linear DDPM schedule over 1000 timesteps, in pixels."""


class DigitsClassifier(nn.Module):
    """Three 3x3 convolutions and a linear head: (N, 1, 8, 8) in [-1, 1] -> (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64 * (IMAGE_SIZE // 2) ** 2, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


def build_reference_dit() -> DiTTransformer2DModel:
    """The untrained digits DiT: 16 tokens, width 128, 6 adaLN-Zero blocks, 2.1 M parameters."""
    model = require("diffusers", extra="diffusers").DiTTransformer2DModel(**DIT_CONFIG)
    for block in model.transformer_blocks:
        # In train mode each block would draw a label-drop mask of its own; training drops labels outside.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def load_reference_dit() -> DiTTransformer2DModel:
    """The trained digits DiT in float32 eval mode: ``model(x, timestep=t, class_labels=y).sample``.

    ``x`` is (N, 1, 8, 8), ``t`` (N,) in [0, 1000) of the linear DDPM schedule, ``y`` (N,) in [0, 10],
    where 10 is the null label; the result is the predicted noise, (N, 1, 8, 8).

    Raises:
        MissingDependencyError: diffusers is not installed.
    """
    return _load(build_reference_dit(), "digits_dit.safetensors")


def load_reference_classifier() -> DigitsClassifier:
    """The classifier that judges samples, float32 eval mode."""
    return _load(DigitsClassifier(), "digits_classifier.safetensors")


def _load(model: M, name: str) -> M:
    data = files(__package__).joinpath("weights", name).read_bytes()
    assert isinstance(model, nn.Module)
    model.load_state_dict({k: v.to(torch.float32) for k, v in load_safetensors(data).items()})
    model.eval().requires_grad_(False)
    return model
