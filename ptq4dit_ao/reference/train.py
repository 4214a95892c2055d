"""Train a reference model and its judge: ``python -m ptq4dit_ao.reference.train --output DIR``.

Training is deterministic for a given ``--seed``, torch version and thread count. It takes about an hour on one CPU
core, and never runs in CI. scikit-learn provides the digits. For ``--data fashion`` and ``flow``, ``--images`` is a
folder with the four files of Fashion-MNIST (``train-images-idx3-ubyte.gz`` and so on; Debian's package
dataset-fashion-mnist has them). After an interruption, the same command continues from the last saved step.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptq4dit_ao._files import replacing_file
from ptq4dit_ao._optional import require
from ptq4dit_ao.calibration import Sampling, as_denoiser, sample
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.reference.models import (
    DIGITS,
    FASHION,
    NUM_CLASSES,
    REFERENCES,
    ImageClassifier,
    Reference,
    build_reference,
    load_reference_classifier,
)

EMA_DECAY = 0.9995
"""Decay of the exponential moving average of the weights."""
LABEL_DROP = 0.1
"""Probability of replacing a label by the null label."""


def load_digits() -> tuple[Tensor, Tensor]:
    """Load all 1797 digits: images (N, 1, 8, 8) in [-1, 1] and labels (N,)."""
    data = require("sklearn.datasets", extra="train").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    return images / 8.0 - 1.0, torch.tensor(data.target, dtype=torch.long)


def load_fashion(folder: Path, part: str = "train") -> tuple[Tensor, Tensor]:
    """Load Fashion-MNIST: images (N, 1, 28, 28) in [-1, 1] and labels (N,), ``train`` (60 000) or ``t10k`` (10 000).

    Raises:
        ArgumentError: the folder lacks the part's two files, or they hold something else.
    """
    size = FASHION.size
    paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    try:
        pixels, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    except (OSError, EOFError, zlib.error) as error:
        raise ArgumentError(f"cannot read Fashion-MNIST from {folder} (--images): {error}") from error
    count = len(labels) - 8  # the IDX header has 8 bytes before labels, and 16 before images
    if count < 1 or len(pixels) != 16 + count * size * size:
        raise ArgumentError(f"{paths[0]} does not hold {count} images of {size} x {size}; get the file again")
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8, offset=16).view(count, 1, size, size)
    return images / 127.5 - 1.0, torch.frombuffer(bytearray(labels), dtype=torch.uint8, offset=8).long()


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment images by a random rotation (+-10 degrees), scale (+-8 %) and shift (+-half a pixel).

    The background stays -1.
    """
    n = len(images)
    angle, scale, dx, dy = (torch.rand(4, n, generator=generator) * 2 - 1).unbind(0)
    angle, scale = angle * math.radians(10), 1 + 0.08 * scale
    cos, sin, shift = torch.cos(angle) * scale, torch.sin(angle) * scale, 0.5 * 2 / images.shape[-1]
    theta = torch.stack([torch.stack([cos, -sin, dx * shift], -1), torch.stack([sin, cos, dy * shift], -1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_classifier(
    reference: Reference, images: Tensor, labels: Tensor, *, seed: int, epochs: int
) -> tuple[ImageClassifier, float]:
    """Train the classifier on 80 % of the images, and return it with its accuracy on the held-out 20 %."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    model = ImageClassifier(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), generator=generator)].split(64):
            loss = F.cross_entropy(model(jitter(images[batch], generator)), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()
    return model, accuracy


@torch.no_grad()
def sample_accuracy(
    reference: Reference, model: nn.Module, classifier: nn.Module, *, per_class: int = 20, seed: int = 0
) -> float:
    """Fraction of samples (guidance 1.5, 50 steps) that the classifier assigns to the requested class."""
    labels = torch.arange(NUM_CLASSES).repeat(per_class)
    denoiser, generator = as_denoiser(model, reference.sampling), torch.Generator().manual_seed(seed)
    images = sample(denoiser, reference.sampling, labels, generator=generator)
    return (classifier(images).argmax(1) == labels).float().mean().item()


Loss = Callable[[Any, Tensor, Tensor, torch.Generator], Tensor]
"""Loss of a model on images and labels of a batch, with the generator of timesteps and noise."""


def _slices(count: int, generator: torch.Generator) -> Tensor:
    """Stratified draws from [0, 1): one from each of ``count`` equal slices."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


def noise_loss(sampling: Sampling) -> Loss:
    """DDPM's loss of the predicted noise, with min-SNR-5 weights (arXiv 2303.09556)."""
    alphas_bar = sampling.scheduler(50).alphas_cumprod
    snr = alphas_bar / (1 - alphas_bar)
    weight = snr.clamp(max=5) / snr

    def loss(model: Any, x0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        batch, timesteps = len(x0), sampling.train_timesteps
        # Timesteps are stratified: one from each of `batch` equal slices of [0, T).
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * timesteps / batch).long()
        t = t.clamp(max=timesteps - 1)
        noise = torch.randn(x0.shape, generator=generator)
        a = alphas_bar[t].view(-1, 1, 1, 1)
        predicted = model(a.sqrt() * x0 + (1 - a).sqrt() * noise, timestep=t, class_labels=labels).sample
        return (weight[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

    return loss


def velocity_loss(reference: Reference) -> Loss:
    """Rectified flow's loss of the velocity, at logit-normal times (arXiv 2403.03206).

    Products are in bfloat16, which is faster on a CPU than the compiled float32, if attention is written out.
    """

    def loss(model: Any, x0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        sigma = torch.special.ndtri(_slices(len(x0), generator).clamp(1e-4, 1 - 1e-4)).sigmoid()
        noise = torch.randn(x0.shape, generator=generator)
        s = sigma.view(-1, 1, 1, 1)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            predicted = as_denoiser(model, reference.sampling)((1 - s) * x0 + s * noise, 1000 * sigma, labels)
        return (predicted.float() - (noise - x0)).square().mean()

    return loss


def train(
    reference: Reference,
    images: Tensor,
    labels: Tensor,
    classifier: nn.Module,
    *,
    seed: int,
    steps: int,
    stop: int,
    batch: int,
    output: Path,
) -> nn.Module:
    """Train a transformer, and return the exponential moving average (EMA) of its weights.

    Every 500 steps all that a run needs to continue is saved, and a run with equal settings begins there.

    Raises:
        ArgumentError: the folder holds the state of a run with other settings, or of a later step.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model: Any = build_reference(reference.name)
    model.train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if reference.flow:
        called, loss_of = model, velocity_loss(reference)
    else:
        called, loss_of = torch.compile(model), noise_loss(reference.sampling)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.99))
    warmup = 500
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / steps)),
    )
    settings = {"seed": seed, "steps": steps, "batch": batch}
    state = output / f"{reference.name}_training.pt"
    stateful = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    first, running = 1, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["settings"] != settings:
            raise ArgumentError(
                f"{state} is of a run with {saved['settings']}, not {settings}; remove it to start anew"
            )
        if saved["step"] > stop:
            raise ArgumentError(f"{state} is at step {saved['step']}, beyond {stop}; remove it to start anew")
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        first, running = saved["step"] + 1, saved["running"]
    start = time.monotonic()
    for step in range(first, stop + 1):
        index = torch.randint(len(images), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < LABEL_DROP
        y = labels[index].masked_fill(dropped, NUM_CLASSES)
        loss = loss_of(called, images[index], y, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
        if step % 500 == 0 or step == stop:
            left = (time.monotonic() - start) / (step - first + 1) * (stop - step) / 60
            print(f"step {step}/{stop} loss {running:.4f} left {left:.1f} min", flush=True)
            with replacing_file(state) as temporary:
                parts = {name: part.state_dict() for name, part in stateful.items()}
                more = {"settings": settings, "generator": generator.get_state(), "step": step, "running": running}
                torch.save({**parts, **more}, temporary)
        if step % 2000 == 0:
            print(f"  sample accuracy {sample_accuracy(reference, ema, classifier):.3f}", flush=True)
    save_half(ema, output / reference.weights)
    return ema


def save_half(model: nn.Module, path: Path) -> None:
    """Save the weights of a model as float16 safetensors."""
    save_file({k: v.detach().to(torch.float16).contiguous() for k, v in model.state_dict().items()}, path)


def main() -> None:
    """Train the models that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(REFERENCES), default=DIGITS.name)
    parser.add_argument("--images", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--output", type=Path, default=Path("weights"))
    parser.add_argument("--steps", type=int, default=14_000, help="length of the learning-rate schedule")
    parser.add_argument("--stop", type=int, default=8_000, help="stop at this step of the schedule (default 8000)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=60, help="training epochs of the classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    reference = REFERENCES[args.data]
    if reference is not DIGITS and args.images is None:
        parser.error(f"--data {args.data} needs --images, a folder with Fashion-MNIST's files")
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits() if reference is DIGITS else load_fashion(args.images)
    if reference.judge == reference.name:
        classifier, accuracy = train_classifier(reference, images, labels, seed=args.seed, epochs=args.epochs)
        save_half(classifier, args.output / f"{reference.name}_classifier.safetensors")
        print(f"classifier: held-out accuracy {accuracy:.4f}", flush=True)
    else:
        classifier = load_reference_classifier(reference.judge)
    model = train(
        reference, images, labels, classifier,
        seed=args.seed, steps=args.steps, stop=args.stop, batch=args.batch, output=args.output,
    )  # fmt: skip
    print(f"transformer: sample accuracy {sample_accuracy(reference, model, classifier, per_class=100, seed=1):.4f}")


if __name__ == "__main__":
    main()
