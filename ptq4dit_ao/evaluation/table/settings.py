"""What a table compares, and the recipe of each of its cells."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ptq4dit_ao.choices import LAYER_PRESETS, SAMPLERS, LayerPreset, Sampler
from ptq4dit_ao.errors import ArgumentError, check_choice
from ptq4dit_ao.lowering.backend import BACKENDS, choose_backend
from ptq4dit_ao.recipe import Recipe, Weights, load_recipe, shipped_recipes

FLOAT = "float32"
_MOST = 2**31
"""Of any number; a recipe's seeds, which add to the table's, end at twice that."""
_BITS = re.compile(r"w([2-8])a([2-8])")


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """Rows are all of steps x bits x methods.

    Raises:
        ArgumentError: a list is empty, holds something twice, or something else than it may.
        PTQ4DiTError: the backend does not run here.
    """

    model: str
    methods: tuple[str, ...]
    """Names of shipped recipes, or recipe files."""
    bits: tuple[str, ...]
    """``w4a8``: weights of 4 bits, activations of 8."""
    steps: tuple[int, ...]
    """Of the sampler."""
    samples: int = 2000
    """Images that each model draws."""
    calibration_images: int = 16
    """At each timestep."""
    seed: int = 0
    """Of calibration; :data:`~ptq4dit_ao.workflow.image_sampling.NOISE_SEED` more, of images."""
    adaround_steps: int | None = None
    """Of methods that learn, in each block; None is the recipe's own."""
    sampler: Sampler = "ddpm"
    """Of calibration and images; ``ddpm`` is that of the DiT authors and the paper."""
    guidance: float = 1.5
    layers: LayerPreset = "paper"
    """The same preset for all methods, as only methods are compared."""
    features: str | None = None
    """As for :func:`~ptq4dit_ao.evaluation.run.evaluate`, like ``reference``."""
    reference: Path | None = None
    backend: str = "reference"
    """What executes the quantized models, as for :func:`~ptq4dit_ao.lower`."""
    ablation: bool = False
    """Also the paper's own parts: base, +CSB, +SSC, +ours."""

    def __post_init__(self) -> None:
        for name in ("methods", "bits", "steps"):
            values = getattr(self, name)
            if not values and not (name == "methods" and self.ablation):
                raise ArgumentError(f"there are no {name}; give at least one (--{name})")
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
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("layers", self.layers, LAYER_PRESETS)
        check_choice("backend", self.backend, tuple(BACKENDS))  # each cell by the same: no "auto"
        choose_backend(self.backend)

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        words = ["ptq4dit-ao", "table", "--model", self.model, "--methods", ",".join(self.methods)]
        words += ["--bits", ",".join(self.bits), "--steps", ",".join(map(str, self.steps))]
        words += ["--samples", str(self.samples), "--calibration-images", str(self.calibration_images)]
        words += ["--seed", str(self.seed), "--guidance", f"{self.guidance:g}", "--layers", self.layers]
        words += ["--sampler", self.sampler, "--backend", self.backend]
        for name in ("adaround_steps", "features", "reference"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words + ["--ablation"] * self.ablation)

    def recipe(self, base: Recipe, bits: str) -> Recipe:
        """A method's recipe, as all methods of this table are calibrated and at these bits."""
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
                "weights": Weights(bits=weights),
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
        ArgumentError: two files have one name.
        RecipeError: there is no such recipe, or it is wrong.
    """
    recipes: dict[str, Recipe] = {}
    for method in settings.methods:
        name = Path(method).name
        if name in recipes:
            raise ArgumentError(f"two methods are called {name!r}; rename one of the files")
        recipes[name] = _recipe(method)
    return recipes | (ablation() if settings.ablation else {})


def ablation() -> dict[str, Recipe]:
    """The parts of the paper's method, one by one; then balancing and rounding of ``auto``. The rest is equal."""
    paper, auto = _recipe("paper"), load_recipe("auto")

    def balanced(method: str) -> Recipe:
        balance = paper.balance.model_copy(update={"method": method, "alpha": 0.5})
        return paper.model_copy(update={"balance": balance})

    ours = paper.model_copy(update={"balance": auto.balance, "rounding": auto.rounding})
    return {"base": balanced("none"), "+CSB": balanced("mean"), "+SSC": balanced("ssc"), "+ours": ours}


def _recipe(method: str) -> Recipe:
    """A recipe whose own name has bits, like ``paper_w8a8``, is found without them, too."""
    at_8_bits = f"{method}_w8a8"
    return load_recipe(at_8_bits if method not in shipped_recipes() and at_8_bits in shipped_recipes() else method)


def _widths(bits: str) -> tuple[int, int]:
    found = _BITS.fullmatch(bits)
    if found is None:
        raise ArgumentError(f"bits {bits!r} are not like 'w4a8' (weights of 4 bits, activations of 8), from 2 to 8")
    return int(found[1]), int(found[2])
