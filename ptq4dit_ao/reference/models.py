"""Reference models: three small transformers of diffusers' classes, with classifiers that judge their samples.

* ``digits``: a DiT (adaLN-Zero) that predicts noise, trained on scikit-learn's digits (1797 real 8x8 grey images, UCI
  "Optical Recognition of Handwritten Digits").
* ``fashion``: a DiT of Fashion-MNIST (60 000 training images of 28x28, arXiv 1708.07747).
* ``flow``: a Flux transformer (joint attention with text tokens, single blocks, rotary positions) that predicts the
  velocity of a rectified flow, of Fashion-MNIST, too. The classifier of ``fashion`` judges its samples.

All are trained by :mod:`ptq4dit_ao.reference.train` and ship as float16 safetensors inside the package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ptq4dit_ao._optional import require
from ptq4dit_ao.calibration import Sampling
from ptq4dit_ao.errors import check_choice

M = TypeVar("M")

NUM_CLASSES = 10
"""Number of classes of all models. The label ``NUM_CLASSES`` is the null label of classifier-free guidance."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Description of a reference model and its judge, except for their weights."""

    name: str
    data: str
    """Name of the training data."""
    size: int
    """Height and width of its grey images, in pixels."""
    patch: int
    judge: str
    """Name of the classifier that judges its samples, by the reference model that it was trained for."""
    pooled: tuple[int, ...]
    """Indices of the classifier's three convolutions that a 2x2 max pooling follows."""
    flow: bool = False
    """Whether the model is a Flux transformer that predicts velocity; otherwise it is a DiT that predicts noise."""

    @property
    def config(self) -> dict[str, Any]:
        """Config of the model: width 128, (size / patch)^2 tokens of the image.

        A ``DiTTransformer2DModel`` has 6 adaLN-Zero blocks. A ``FluxTransformer2DModel`` has 2 blocks with joint
        attention to text, and 4 single blocks.
        """
        if self.flow:
            return {
                "patch_size": 1,
                "in_channels": self.patch**2,
                "num_layers": 2,
                "num_single_layers": 4,
                "num_attention_heads": 4,
                "attention_head_dim": 32,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 64,
                "axes_dims_rope": (8, 12, 12),
            }
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
        """Sampling that the model was trained for, in pixels: DDPM's linear schedule over 1000 timesteps, or a flow."""
        plain = Sampling(channels=1, size=self.size, null_label=NUM_CLASSES, clip=True)
        return replace(plain, sampler="flow", patch=self.patch) if self.flow else plain

    @property
    def weights(self) -> str:
        """Name of the file with the model's weights."""
        return f"{self.name}_{'transformer' if self.flow else 'dit'}.safetensors"


DIGITS = Reference(name="digits", data="scikit-learn's digits", size=8, patch=2, judge="digits", pooled=(1,))
FASHION = Reference(name="fashion", data="Fashion-MNIST", size=28, patch=4, judge="fashion", pooled=(0, 1))
FLOW = replace(FASHION, name="flow", flow=True)
REFERENCES = {reference.name: reference for reference in (DIGITS, FASHION, FLOW)}

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


def build_reference(name: str = "digits") -> Any:
    """Build an untrained reference model with 2.1 or 2.3 M parameters. Its training drops labels itself."""
    reference, diffusers = REFERENCES[name], require("diffusers", extra="diffusers")
    if reference.flow:
        return _from_zero(diffusers.FluxTransformer2DModel(**reference.config))
    model = diffusers.DiTTransformer2DModel(**reference.config)
    for block in model.transformer_blocks:
        # In train mode each block would draw its own label-drop mask. Training drops the labels itself.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def _from_zero(model: M) -> M:
    """Zero the layers that adaLN-Zero starts from zero, which diffusers leaves to a checkpoint."""
    assert isinstance(model, nn.Module)
    for name, parameter in model.named_parameters():
        if re.match(r"(.*\.)?norm.*\.linear\.|proj_out\.", name):
            nn.init.zeros_(parameter)
    return model


def load_reference_dit(name: str = "digits") -> Any:
    """Load a trained reference model in float32 eval mode.

    ``digits`` and ``fashion`` are DiTs: ``model(x, timestep=t, class_labels=y).sample``. ``x`` is (N, 1, S, S) with S =
    8 for ``digits`` and 28 for ``fashion``, ``t`` is (N,) in [0, 1000) of the linear DDPM schedule, and ``y`` is (N,)
    in [0, 10], where 10 is the null label. The result is the predicted noise, (N, 1, S, S).

    ``flow`` is a ``FluxTransformer2DModel``: ``model(*flow_inputs(x, t, y, patch=4)).sample``, with ``flow_inputs`` of
    :mod:`ptq4dit_ao.calibration.flow` and ``t`` in [0, 1000]. The result is the predicted velocity in patches, (N, 49,
    16).

    Raises:
        ArgumentError: there is no such model.
        MissingDependencyError: diffusers is not installed.
    """
    check_choice("name", name, tuple(REFERENCES))
    return _load(build_reference(name), REFERENCES[name].weights)


def load_reference_classifier(name: str = "digits") -> ImageClassifier:
    """Load the classifier that judges samples, in float32 eval mode.

    Raises:
        ArgumentError: there is no such classifier.
    """
    check_choice("name", name, tuple(REFERENCES))
    return _load(ImageClassifier(REFERENCES[name]), f"{REFERENCES[name].judge}_classifier.safetensors")


def _load(model: M, name: str) -> M:
    data = files(__package__).joinpath("weights", name).read_bytes()
    assert isinstance(model, nn.Module)
    model.load_state_dict({k: v.to(torch.float32) for k, v in load_safetensors(data).items()})
    model.eval().requires_grad_(False)
    return model
