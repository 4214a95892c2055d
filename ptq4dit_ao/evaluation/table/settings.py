"""Settings of a table, and the recipe of each of its cells."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ptq4dit_ao.choices import LAYER_PRESETS, SAMPLERS, LayerPreset, LpipsNetwork, Sampler
from ptq4dit_ao.errors import ArgumentError, check_choice
from ptq4dit_ao.lowering.backend import BACKENDS, choose_backend
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.recipe.load import load_method

FLOAT = "float32"
"""Method name of the float model's rows."""
_MOST = 2**31
"""Largest value of a number. A recipe's seeds, to which the table's seed is added, may be twice as large."""
_BITS = re.compile(r"w([2-8])a([2-8])")


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """Settings of a table, whose rows are all combinations of steps, bits and methods.

    Raises:
        ArgumentError: a list is empty, holds a value twice, or holds a value that is not allowed.
        PTQ4DiTError: the backend does not run here.
    """

    model: str
    """Float model, as for :func:`~ptq4dit_ao.workflow.load_model`."""
    methods: tuple[str, ...]
    """Names of shipped recipes, or recipe files."""
    bits: tuple[str, ...]
    """Bit widths such as ``w4a8``: weights of 4 bits, activations of 8."""
    steps: tuple[int, ...]
    """Numbers of sampling steps."""
    samples: int = 2000
    """Number of images per model."""
    calibration_images: int = 16
    """Number of calibration images at each timestep."""
    seed: int = 0
    """Seed of calibration. That of images is larger by :data:`~ptq4dit_ao.workflow.image_sampling.NOISE_SEED`."""
    adaround_steps: int | None = None
    """Optimizer steps per block of methods that learn; None is the recipe's own."""
    sampler: Sampler | None = None
    """Sampler of calibration and images.

    The default is ``ddpm``, that of the DiT authors' code and the paper, for models that predict noise, and the model's
    own for others.
    """
    guidance: float = 1.5
    """Classifier-free guidance scale of calibration and images."""
    layers: LayerPreset = "paper"
    """Layer preset of all methods, so that only methods are compared."""
    features: str | None = None
    """Feature network, as for :func:`~ptq4dit_ao.evaluation.run.evaluate`."""
    reference: Path | None = None
    """Reference set, as for :func:`~ptq4dit_ao.evaluation.run.evaluate`."""
    lpips: LpipsNetwork | None = None
    """Network to compare images with, too, see :func:`~ptq4dit_ao.metrics.lpips`."""
    backend: str = "reference"
    """Backend that executes the quantized models, as for :func:`~ptq4dit_ao.lower`."""
    ablation: bool = False
    """Whether the parts of the paper's method are compared, too: base, +CSB, +SSC, +ours."""

    def __post_init__(self) -> None:
        for name in ("methods", "bits", "steps"):
            values = getattr(self, name)
            if not values and not (name == "methods" and self.ablation):
                raise ArgumentError(f"there are no {name}; give at least one ({name}=...)")
            twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
            if twice is not None:
                raise ArgumentError(f"{name} has {twice!r} twice; leave one out")
        for name, least in {"samples": 1, "calibration_images": 1, "seed": 0, "guidance": 0}.items():
            if not least <= getattr(self, name) <= _MOST:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must lie between {least} and {_MOST}")
        if self.adaround_steps is not None and self.adaround_steps < 1:
            raise ArgumentError(f"adaround_steps is {self.adaround_steps}; it must be at least 1")
        for bits in self.bits:
            _widths(bits)
        if self.sampler is not None:
            check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("layers", self.layers, LAYER_PRESETS)
        check_choice("backend", self.backend, tuple(BACKENDS))  # "auto" could differ between cells
        choose_backend(self.backend)

    @property
    def command(self) -> str:
        """The command line for these settings."""
        words = ["ptq4dit-ao", "table", "--model", self.model, "--methods", ",".join(self.methods)]
        words += ["--bits", ",".join(self.bits), "--steps", ",".join(map(str, self.steps))]
        words += ["--samples", str(self.samples), "--calibration-images", str(self.calibration_images)]
        words += ["--seed", str(self.seed), "--guidance", f"{self.guidance:g}", "--layers", self.layers]
        words += [] if self.sampler is None else ["--sampler", self.sampler]
        words += ["--backend", self.backend]
        for name in ("adaround_steps", "features", "reference", "lpips"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words + ["--ablation"] * self.ablation)

    def recipe(self, base: Recipe, bits: str) -> Recipe:
        """Recipe of a method with this table's calibration settings and these bits."""
        weights, activations = _widths(bits)
        learned = {} if self.adaround_steps is None else {"steps": self.adaround_steps}
        calibration = {
            "samples": self.calibration_images,
            "guidance": self.guidance,
            "sampler": self.sampler,
            "seed": self.seed,
        }
        return base.model_copy(
            update={
                "model": self.model,
                "layers": self.layers,
                "weights": base.weights.with_bits(weights),
                "activations": base.activations.model_copy(update={"bits": activations}),
                "rounding": base.rounding.model_copy(update=learned if base.rounding.method == "adaround" else {}),
                "calibration": base.calibration.model_copy(update=calibration),
                **{
                    name: section.model_copy(update={"seed": section.seed + self.seed})
                    for name in ("evaluation", "noise_correction")
                    if (section := getattr(base, name))
                },
            }
        )


def method_recipes(settings: TableSettings) -> dict[str, Recipe]:
    """Name -> recipe of each method, in the order of the rows.

    Raises:
        ArgumentError: two files have the same name.
        RecipeError: a recipe does not exist, or is wrong.
    """
    recipes: dict[str, Recipe] = {}
    for method in settings.methods:
        name = Path(method).name
        if name in recipes:
            raise ArgumentError(f"two methods are called {name!r}; rename one of the files")
        recipes[name] = load_method(method)
    return recipes | (ablation() if settings.ablation else {})


def ablation() -> dict[str, Recipe]:
    """Recipes of the parts of the paper's method, one by one, and of ``auto``'s levels, balancing and rounding.

    The rest is equal.
    """
    paper, auto = load_method("paper"), load_method("auto")

    def balanced(method: str) -> Recipe:
        balance = paper.balance.model_copy(update={"method": method, "alpha": 0.5})
        return paper.model_copy(update={"balance": balance})

    ours = paper.model_copy(update={"weights": auto.weights, "balance": auto.balance, "rounding": auto.rounding})
    return {"base": balanced("none"), "+CSB": balanced("mean"), "+SSC": balanced("ssc"), "+ours": ours}


def _widths(bits: str) -> tuple[int, int]:
    found = _BITS.fullmatch(bits)
    if found is None:
        raise ArgumentError(f"bits {bits!r} are not like 'w4a8' (weights of 4 bits, activations of 8), from 2 to 8")
    return int(found[1]), int(found[2])
