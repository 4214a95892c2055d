"""What a recipe may say: frozen models that refuse unknown keys and values of a near-miss type (``"8"``, ``true``).

Every default lives here and nowhere else. ``RecipeFile`` is the same recipe as it stands in one YAML file, where
``version`` must be written out and ``extends`` may name a base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ptq4dit_ao.choices import BalanceMethod, FoldForm, LayerPreset, Ranges, RoundingMethod, Sampler, Start
from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe.problems import describe, show, version_problem
from ptq4dit_ao.recipe.values import (
    Alpha,
    Bits,
    BitsCandidates,
    BitsOrAuto,
    Count,
    OnlyFalse,
    OnlyTrue,
    Seed,
    TimestepList,
    Timesteps,
    Version,
    as_tuple,
    count_or_list,
)
from ptq4dit_ao.recipe.yaml_text import write_yaml


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _rule(message: str, **values: object) -> PydanticCustomError:
    """A fault of several keys together; "recipe_rule" is the type whose message is taken over as it is."""
    return PydanticCustomError("recipe_rule", message, values)


class Weights(_Section):
    """How weights are quantized."""

    bits: BitsOrAuto = Field(
        default=8,
        description="Width of a weight in bits, 2 to 8. 'auto': each layer's own, one of 'candidates', so that they "
        "have 'average_bits' at most.",
    )
    candidates: BitsCandidates | None = Field(
        default=None, description="For bits: auto. The widths to choose from; [4, 8] if left out."
    )
    average_bits: float | None = Field(
        default=None, ge=2, le=8, description="For bits: auto. Mean width of all quantized weights, at most."
    )

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if self.bits != "auto":
            for name in ("candidates", "average_bits"):
                if getattr(self, name) is not None:
                    raise _rule(
                        "{name} is for bits: auto, and bits is {bits}; remove one of them", name=name, bits=self.bits
                    )
        elif self.average_bits is None:
            raise _rule("bits: auto needs average_bits; add how many bits a weight may take on average")
        else:
            low, high = min(self.widths), max(self.widths)
            if not low <= self.average_bits <= high:
                raise _rule(
                    "average_bits is {average}, and the candidates go from {low} to {high}; choose it between them, or "
                    "other candidates",
                    average=f"{self.average_bits:g}",
                    low=low,
                    high=high,
                )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """What ``bits: auto`` chooses from, ascending."""
        return tuple(sorted(self.candidates or (4, 8)))


class Activations(_Section):
    """How activations are quantized."""

    bits: Bits = Field(default=8, description="Width of an activation in bits, 2 to 8.")


class Attention(_Section):
    """Whether attention's own matrix products are quantized: q, k, v and the probabilities."""

    quantize: bool = Field(
        default=False,
        description="true: quantize what attention multiplies, as the PTQ4DiT paper does. false: leave it float.",
    )
    bits: Bits = Field(default=8, description="Width of q, k, v and the probabilities in bits, 2 to 8.")


class Balance(_Section):
    """How extreme channels are shared out between activation and weight before quantization (CSB and SSC)."""

    method: BalanceMethod = Field(
        default="ssc",
        description="How the balancing factors are found. By salience, where the activation's of several timesteps "
        "becomes one: 'ssc' weighs timesteps by Spearman's rho with the weight salience (the lower, the more), 'max' "
        "(SmoothQuant) and 'mean' ignore the weights. 'auto': each site takes what leaves least error after rounding. "
        "'repq': RepQ-ViT's, which gives all channels one scale and one zero point; it takes no alpha. 'none': no "
        "balancing (plain min-max baseline).",
    )
    alpha: Alpha = Field(
        default=0.5,
        description="Balancing exponent, 0 to 1; 0.5 is the geometric mean of activation and weight salience. 'auto': "
        "each site takes what leaves least error after rounding, or is left alone.",
    )
    max_scale: float = Field(
        default=1000.0, gt=1, description="A balancing factor is clipped into [1/max_scale, max_scale]; above 1."
    )
    fold_form: FoldForm = Field(
        default="constant", description="How the factors are folded into the adaLN modulation: 'constant' or 'bias'."
    )
    couple_blocks: bool = Field(
        default=False,
        description="true: also balance layers that would have to share one factor across blocks, as the cross "
        "attention of all blocks behind one caption projection.",
    )
    vector_multiply: bool = Field(
        default=True,
        description="false: leave out what needs one multiply of a modulation vector per call, where one layer "
        "modulates all blocks (adaLN-single). Everything else costs nothing at run time.",
    )
    min_variables: Count = Field(
        default=4, description="Leave out layers in which fewer channels than this can have factors of their own."
    )
    verify: bool = Field(
        default=True,
        description="false: do not check that the balanced float model computes what it did before.",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_the_method(cls, data: object) -> object:
        if isinstance(data, Mapping) and "aggregation" in data:
            raise _rule("the key 'aggregation' is called 'method' now; rename it")
        return data


class Rounding(_Section):
    """How weights are rounded, and how far the ranges reach, after balancing."""

    method: RoundingMethod = Field(
        default="nearest",
        description="'nearest'; 'gptq', which rounds weights and corrects biases in view of what they are multiplied "
        "with; or 'adaround', by which the weights of a block learn together which way to round (sequential: true).",
    )
    ranges: Ranges = Field(
        default="minmax",
        description="'minmax': a range holds every value seen. 'output': tails are cut where the layer's output gains. "
        "'percentile': PTQ4DiT's and RepQ-ViT's search, 'lp': PTQ4DM's and Q-Diffusion's, for what keeps the values.",
    )
    sequential: bool = Field(
        default=False,
        description="true: round layer by layer, each for the inputs of the quantized network and towards the float "
        "network's output. false: in one pass, from statistics of the float network.",
    )
    tokens: Count = Field(
        default=32768,
        description="How many calibration tokens (rows of a linear's input) a sequential rounding runs; its memory "
        "grows with them.",
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="What GPTQ adds to the diagonal of the inputs' second moment, as a part of its mean.",
    )
    start: Start = Field(
        default="nearest", description="Where 'adaround' starts: at the float weight, or at what 'gptq' finds."
    )
    steps: Count = Field(default=20_000, description="How often 'adaround' updates the weights of a block.")
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="What 'adaround' may take for all blocks together; with a limit, results depend on the machine.",
    )

    @model_validator(mode="after")
    def _learns_in_sequence(self) -> Self:
        if self.method == "adaround" and not self.sequential:
            raise PydanticCustomError(
                "recipe_rule", "method 'adaround' learns block by block; add sequential: true", {}
            )
        return self


class Distillation(_Section):
    """How long the whole quantized network learns from the float one, after its weights have been rounded."""

    steps: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="How often integers, scales, biases and ranges of all layers are updated, with 'calibration.batch_"
        "size' images each time; 0: not at all. Needs rounding.sequential: true.",
    )
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="What that may take; with a limit, results depend on the machine.",
    )


_NOT_WITH_SKIP = ("weight_bits", "activation_bits", "balance")


class Override(_Section):
    """A different treatment for the modules whose name matches 'pattern': either ``skip``, or any of the others."""

    # The two rules of `_asks_for_one_thing`, for editors: exactly one of "skip" and "any of the rest".
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["skip"]}, {"anyOf": [{"required": [name]} for name in _NOT_WITH_SKIP]}]
        }
    )

    pattern: str = Field(
        min_length=1, description="Shell-style pattern (fnmatch) over module names, as in 'transformer_blocks.0.*'."
    )
    skip: OnlyTrue | None = Field(
        default=None, description="true: leave these modules in float. Excludes the other keys."
    )
    weight_bits: Bits | None = Field(default=None, description="Width of a weight in bits, 2 to 8.")
    activation_bits: Bits | None = Field(default=None, description="Width of an activation in bits, 2 to 8.")
    balance: OnlyFalse | None = Field(default=None, description="false: quantize these modules without balancing them.")

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Self:
        others = [name for name in _NOT_WITH_SKIP if getattr(self, name) is not None]
        if self.skip and others:
            raise _rule(
                "pattern '{pattern}' asks for skip and for {others}; a skipped module stays float, keep one of them",
                pattern=self.pattern,
                others=", ".join(others),
            )
        if not self.skip and not others:
            raise _rule(
                "pattern '{pattern}' asks for nothing; add one of skip, {others}",
                pattern=self.pattern,
                others=", ".join(_NOT_WITH_SKIP),
            )
        return self


class NormalDraw(_Section):
    """PTQ4DM's draw of calibration timesteps: each image is observed at timesteps of its own."""

    draw: Literal["normal"] = Field(description="'normal': positions in the schedule are normally distributed.")
    mean: float = Field(
        default=0.4, description="Mean, as a fraction of the schedule; 0 is its end, which sees the least noise."
    )
    std: float = Field(default=0.4, ge=0, description="Standard deviation, as a fraction of the schedule.")
    count: Count = Field(default=1024, description="Draws in all, at least as many as images.")


def _count_list_or_draw(value: object) -> str:
    return "drawn" if isinstance(value, Mapping | NormalDraw) else count_or_list(value)


class Calibration(_Section):
    """What the activation statistics are taken from."""

    timesteps: Annotated[
        Annotated[Count, Tag("count")] | Annotated[TimestepList, Tag("list")] | Annotated[NormalDraw, Tag("drawn")],
        Discriminator(_count_list_or_draw),
    ] = Field(
        default=25,
        description="How many timesteps to observe, evenly spaced; or the list of them (numbers >= 0, all different); "
        "or how to draw them for each image.",
    )
    samples: Count = Field(default=16, description="Images per timestep.")
    batch_size: Count = Field(
        default=16, description="Images drawn at a time; calibration runs twice as many rows, as with guidance."
    )
    steps: Count = Field(default=50, description="Steps of the sampler that draws the images.")
    sampler: Sampler | None = Field(
        default=None,
        description="That sampler, for models that are drawn by class: 'ddim' or 'ddpm'; the pipeline's own if left "
        "out. Choose what the quantized model will be drawn with.",
    )
    guidance: float = Field(default=1.5, ge=0, description="Classifier-free guidance scale of that sampler, 0 or more.")
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description="What a text-to-image or text-to-video pipeline draws; used again from the first if there are "
        "more samples than prompts.",
    )
    height: Count | None = Field(default=None, description="Height in pixels; the pipeline's own if left out.")
    width: Count | None = Field(default=None, description="Width in pixels; the pipeline's own if left out.")
    num_frames: Count | None = Field(default=None, description="Frames of a video; the pipeline's own if left out.")
    seed: Seed = Field(default=0, description="Seed of labels and starting noise, 0 to 2^32 - 1.")

    @property
    def rows(self) -> int:
        """Rows that calibration and evaluation run at a time."""
        return 2 * self.batch_size


class Evaluation(_Section):
    """What the quantized model is compared with the float model on."""

    timesteps: Timesteps = Field(
        default=20, description="How many timesteps to compare at, or the list of them (numbers >= 0, all different)."
    )
    samples: Count = Field(default=32, description="Images per timestep.")
    seed: Seed = Field(default=1000, description="Seed of labels and starting noise; keep it apart from calibration's.")
    leave_one_out: bool = Field(
        default=True,
        description="false: do not measure what each layer costs, by putting one after the other back to float.",
    )


class NoiseCorrection(_Section):
    """A correction of the predicted noise in the scheduler (PTQD), for models that are drawn by class."""

    images: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Images along whose trajectories it is fitted, some hundred; 0: no correction. Steps and guidance "
        "are those of 'calibration'.",
    )
    seed: Seed = Field(default=2000, description="Seed of their noise; keep it apart from that of other images.")


class Recipe(_Section):
    """Everything that decides how a model is quantized. All sections are optional: ``Recipe()`` is W8A8 with SSC.

    Built in Python, a wrong value raises pydantic's ``ValidationError``; read from a dict or a file, ``RecipeError``.
    """

    version: Version = Field(default=1, description="Version of the recipe format; this release reads 1.")
    description: str = Field(default="", description="One line on what the recipe is for.")
    model: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="The model: 'reference' or 'fashion' (shipped), a path to a diffusers model folder, or "
        "'package.module:function'.",
    )
    weights: Weights = Weights()
    activations: Activations = Activations()
    attention: Attention = Attention()
    balance: Balance = Balance()
    rounding: Rounding = Rounding()
    distillation: Distillation = Distillation()
    layers: LayerPreset = Field(default="safe", description="Preset of layers that stay float: 'safe' or 'paper'.")
    overrides: Annotated[tuple[Override, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="Exceptions for single modules; where several patterns match, the later one wins."
    )
    calibration: Calibration = Calibration()
    noise_correction: NoiseCorrection = NoiseCorrection()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _distills_what_was_rounded(self) -> Self:
        if self.distillation.steps and not self.rounding.sequential:
            raise _rule(
                "distillation.steps is {steps}: what learns must have been rounded layer by layer; add rounding: "
                "sequential: true, or remove distillation",
                steps=self.distillation.steps,
            )
        return self

    @property
    def widths(self) -> str:
        """Bits of weights and activations, ``W4A8``; ``W4-8A8`` where overrides give some layers others."""
        weights = self.weights.widths if self.weights.bits == "auto" else (self.weights.bits,)
        of_weights = {*weights, *(o.weight_bits for o in self.overrides if o.weight_bits is not None)}
        of_activations = {self.activations.bits} | {o.activation_bits for o in self.overrides if o.activation_bits}
        return f"W{_span(of_weights)}A{_span(of_activations)}"

    def to_dict(self) -> dict[str, object]:
        """The whole recipe, defaults included, as a dict that ``json.dump`` takes and ``from_dict`` reads back."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        """``to_dict`` as the text of a recipe file."""
        return write_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, object], *, name: str = "recipe") -> Self:
        """Read ``to_dict`` back; a ``RecipeError`` lists every problem, each behind the recipe's name."""
        if not isinstance(data, Mapping):
            raise RecipeError(f"{name}: {show(data)} is not a mapping; give what Recipe.to_dict returned")
        problem = version_problem(data)
        if problem:
            raise RecipeError(f"{name}: {problem.text}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError("\n".join(f"{name}: {p.text}" for p in describe(error, cls, data))) from None


class RecipeFile(Recipe):
    """A recipe as it stands in one YAML file, before its base is merged in."""

    version: Version = Field(description="Version of the recipe format; this release reads 1.")
    extends: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="The recipe this one builds on: a path relative to this file, or the name of a shipped recipe. "
        "Mappings are merged key by key; scalars and lists replace those of the base.",
    )

    @model_validator(mode="after")
    def _distills_what_was_rounded(self) -> Self:
        return self  # its base may have the other key


def _span(bits: set[int]) -> str:
    low, high = min(bits), max(bits)
    return str(low) if low == high else f"{low}-{high}"
