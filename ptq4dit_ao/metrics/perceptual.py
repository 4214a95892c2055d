"""Perceptual figures of images by trained networks: LPIPS of paired images, and the CLIP score of images and texts.

The networks' weights are the user's own. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path
from ptq4dit_ao.choices import LPIPS_NETWORKS, LpipsNetwork
from ptq4dit_ao.errors import ArgumentError, check_choice
from ptq4dit_ao.metrics.intervals import Estimate, bootstrap_mean

LEAST_PIXELS = 64
"""Smallest height and width of images that LPIPS is for: its networks halve them five times."""
BATCH = 32
"""Number of images that a network sees at once."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the pixels in [0, 1] that CLIP was trained with."""
_IN_TORCHVISION = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


@torch.no_grad()
def lpips(reference: Tensor, images: Tensor, network: LpipsNetwork = "alex") -> Tensor:
    """Learned perceptual distance (Zhang et al. 2018, by torchmetrics): (N, C, H, W) twice -> (N,) float64.

    Args:
        reference: the reference images in [-1, 1], of 1 or 3 channels and at least 64 pixels.
        images: the images to compare, of the same shape.
        network: ``alex``, ``vgg`` or ``squeeze``.

    Raises:
        ArgumentError: see :func:`check_lpips`; or the shapes differ, or are not those of such images.
        MissingDependencyError: torchmetrics or torchvision is not installed.
    """
    shape = tuple(images.shape)
    if tuple(reference.shape) != shape or images.ndim != 4 or shape[0] == 0 or shape[1] not in (1, 3):
        raise ArgumentError(
            f"images have shape {shape} and their references {tuple(reference.shape)}; LPIPS expects one (N, 3, H, W) "
            "or (N, 1, H, W) of both"
        )
    check_lpips(network, min(shape[2:]))
    measure = require("torchmetrics.functional.image", extra="lpips").learned_perceptual_image_patch_similarity
    found = []
    for pair in zip(reference.split(BATCH), images.split(BATCH), strict=True):
        finite = torch.stack([part.flatten(1).isfinite().all(1) for part in pair]).all(0)
        shown = [_colours(part.nan_to_num(0)) for part in pair]
        distances = measure(*shown, network, reduction="none").reshape(-1).double()
        found.append(distances.masked_fill(~finite, torch.nan))
    return torch.cat(found)


def check_lpips(network: str, pixels: int | None = None) -> None:
    """Check before a long computation that LPIPS can be computed, without a download.

    Args:
        network: the network.
        pixels: height or width of the images, where it is known.

    Raises:
        ArgumentError: there is no such network, or no file with its weights, or the images are too small.
        MissingDependencyError: torchmetrics or torchvision is not installed.
    """
    check_choice("lpips", network, LPIPS_NETWORKS)
    if pixels is not None and pixels < LEAST_PIXELS:
        raise ArgumentError(
            f"images have {pixels} pixels a side, and LPIPS is for {LEAST_PIXELS} and more; leave it out (lpips=...)"
        )
    require("torchmetrics", extra="lpips")
    models = require("torchvision.models", extra="lpips")
    url = models.get_model_weights(_IN_TORCHVISION[network]).DEFAULT.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        raise ArgumentError(
            f"LPIPS by {network!r} needs torchvision's weights as {path}, and nothing is downloaded; put {url} there, "
            "or set TORCH_HOME to where they are"
        )


@torch.no_grad()
def clip_score(images: Tensor, prompts: Sequence[str], folder: str | Path, *, seed: int = 0) -> Estimate:
    """CLIP score (Hessel et al. 2021, without its factor 2.5): mean of ``100 max(0, cosine)`` of images and texts.

    Args:
        images: images in [-1, 1], (N, C, H, W) of 1 or 3 channels.
        prompts: the text of each image.
        folder: folder of a ``CLIPModel`` with its tokenizer, as ``save_pretrained`` writes it.
        seed: seed of the interval over images.

    Raises:
        ArgumentError: the folder does not hold such a model, or there is not one text for each image.
        MissingDependencyError: transformers is not installed.
    """
    if isinstance(prompts, str) or len(prompts) != len(images) or images.ndim != 4 or images.shape[1] not in (1, 3):
        what = "is a text" if isinstance(prompts, str) else f"are {len(prompts)} texts"
        raise ArgumentError(
            f"there {what} for images of shape {tuple(images.shape)}; give images (N, 3, H, W) and a list of N texts"
        )
    model, tokenizer = _clip(as_path(folder, "folder"))
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    scores = []
    for start in range(0, len(images), BATCH):
        pixels = _square(_colours(images[start : start + BATCH]), size) / 2 + 0.5
        texts = tokenizer(list(prompts[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt")
        found = model(
            input_ids=texts["input_ids"],
            attention_mask=texts["attention_mask"],
            pixel_values=(pixels.clamp(0, 1) - mean) / std,
        )
        scores.append(100 * F.cosine_similarity(found.image_embeds, found.text_embeds).clamp(min=0).double())
    return bootstrap_mean(torch.cat(scores).numpy(), seed=seed)


def _colours(images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W) as float32 in [-1, 1] with 3 channels."""
    return images.float().clamp(-1, 1).expand(-1, 3, -1, -1)


def _square(images: Tensor, size: int) -> Tensor:
    """Images resized so that the shorter side has ``size`` pixels, and the square in their middle."""
    shorter = min(images.shape[2:])
    height, width = (round(side * size / shorter) for side in images.shape[2:])
    images = F.interpolate(images, size=(height, width), mode="bicubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return images[:, :, top : top + size, left : left + size]


def _clip(folder: Path) -> tuple[Any, Any]:
    """A CLIP model in eval mode and its tokenizer, from a folder."""
    transformers = require("transformers", extra="diffusers")
    if not (folder / "config.json").is_file():
        raise ArgumentError(f"there is no CLIP model in {folder}; give the folder of one, as save_pretrained writes it")
    try:
        model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:  # transformers' errors for bad files
        raise ArgumentError(f"{folder} cannot be loaded as a CLIP model with its tokenizer: {error}") from error
    return model.eval(), tokenizer
