"""Schema of recipes: frozen models that refuse unknown keys and values of a near-miss type (``"8"``, ``true``).

Every default is defined here and nowhere else. ``RecipeFile`` is a recipe as one YAML file holds it: ``version`` must
be written out, and ``extends`` may name a base.
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

from ptq4dit_ao.choices import (
    BalanceMethod,
    FoldForm,
    LayerPreset,
    Levels,
    Ranges,
    RoundingMethod,
    Sampler,
    Sites,
    Start,
)
from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe.problems import describe, show, version_problem
from ptq4dit_ao.recipe.values import (
    ActivationBits,
    Alpha,
    Bits,
    BitsCandidates,
    BitsOrAuto,
    Count,
    Cutting,
    DynamicOrAuto,
    DynamicOrNot,
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
    """An error of several keys together. The type "recipe_rule" marks a message that is reported unchanged."""
    return PydanticCustomError("recipe_rule", message, values)


class Weights(_Section):
    """Quantization of the weights."""

    bits: BitsOrAuto = Field(
        default=8,
        description="Width of a weight in bits, 2 to 8, or 'auto'. 'auto' chooses one of 'candidates' for each layer, "
        "such that the mean width is at most 'average_bits'.",
    )
    candidates: BitsCandidates | None = Field(
        default=None, description="Widths that bits: auto chooses from, at least two. If left out, [4, 8]."
    )
    average_bits: float | None = Field(
        default=None,
        ge=2,
        le=8,
        description="Upper limit of the mean width of all quantized weights, in bits, without scales and the steps of "
        "groups. Required by bits: auto.",
    )

    group: Annotated[int, Field(ge=16)] | None = Field(
        default=None,
        description="Number of consecutive input channels that share a step, 16 or more, for weights of 4 bits with "
        "levels: normal. A step takes 4 bits. If left out, all channels of a row share one.",
    )
    levels: Levels = Field(
        default="uniform",
        description="Spacing of the 16 values of a weight of 4 bits. 'uniform': equal. 'normal': denser around 0, as "
        "is best for normally distributed weights; such weights expand exactly to integers of 8 bits when they are "
        "loaded. Weights of other widths are always uniform.",
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

    def with_bits(self, bits: int) -> Self:
        """The same with one width for all weights."""
        return self.model_copy(update={"bits": bits, "candidates": None, "average_bits": None})

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that ``bits: auto`` chooses from, ascending."""
        return tuple(sorted(self.candidates or (4, 8)))


class Activations(_Section):
    """Quantization of the activations."""

    bits: ActivationBits = Field(
        default=8,
        description="Width of an activation in bits, 2 to 8; or 16, with which activations stay float and weights "
        "alone are quantized (they are stored and held as integers).",
    )
    dynamic: DynamicOrAuto = Field(
        default=False,
        description="false: one range for each linear's input, from calibration. 'token': every token (row) of an "
        "input has a range of its own, found at run time; closer, and some more time for each row. 'auto': 'token' for "
        "the layers that gain most, within 'share'. Attention's own products are always static.",
    )
    share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Upper limit of the part of all quantized linears' multiplications whose inputs 'auto' makes "
        "dynamic, above 0, at most 1. Required by dynamic: auto.",
    )

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if self.bits == 16 and self.dynamic:
            raise _rule("bits: 16 keeps activations float, and dynamic quantizes them; remove one of them")
        if self.dynamic == "auto" and self.share is None:
            raise _rule("dynamic: auto needs share; add the part of the linears that may be dynamic, such as 0.4")
        if self.dynamic != "auto" and self.share is not None:
            raise _rule(
                "share is for dynamic: auto, and dynamic is {dynamic}; remove one of them", dynamic=show(self.dynamic)
            )
        return self


class Attention(_Section):
    """Quantization of attention's own matrix products, which multiply q, k, v and the probabilities."""

    quantize: bool = Field(
        default=False,
        description="true: quantize the inputs of attention's matrix products, as the PTQ4DiT paper does. false: keep "
        "these products in float.",
    )
    bits: Bits = Field(default=8, description="Width of q, k, v and the attention probabilities in bits, 2 to 8.")


class Balance(_Section):
    """Balancing of extreme channels between activations and weights before quantization (PTQ4DiT's CSB and SSC)."""

    method: BalanceMethod = Field(
        default="ssc",
        description="Method that finds the balancing factors. 'ssc', 'max' and 'mean' reduce the activation salience "
        "of several timesteps to one vector: 'ssc' gives a timestep more weight the lower its Spearman correlation "
        "with the weight salience is, 'max' takes the maximum (SmoothQuant), and 'mean' takes the mean. 'auto' chooses "
        "the one with the least error after rounding, for each site. 'repq' gives all channels one scale and one zero "
        "point (RepQ-ViT) and allows no 'alpha'. 'none' does not balance (min-max baseline).",
    )
    alpha: Alpha = Field(
        default=0.5,
        description="Exponent of the balancing factors, 0 to 1; at 0.5 they are the geometric mean of activation and "
        "weight salience. 'auto' chooses the exponent with the least error after rounding, or no balancing, for each "
        "site.",
    )
    center: bool = Field(
        default=False,
        description="true: subtract the middle of each channel's range from inputs that a parameter shifts, such as "
        "the shift of adaLN, and correct the biases of the layers that read them; with 'auto', each site chooses. It "
        "costs nothing at run time. 'repq' has its own.",
    )
    max_scale: float = Field(
        default=1000.0,
        gt=1,
        description="Limit of the balancing factors, above 1. They are clipped to [1/max_scale, max_scale].",
    )
    fold_form: FoldForm = Field(
        default="constant",
        description="Form of the fold into the adaLN modulation 1 + scale. 'constant' replaces the 1 by the vector of "
        "reciprocal factors. 'bias' keeps the 1 and changes the bias of the layer that computes the scale.",
    )
    sites: Sites = Field(
        default="free",
        description="Layers that are balanced. 'folded': those whose factors fold into parameters before them. 'all': "
        "the others, too, by a multiplication of their input. A quantized module does it as part of quantizing the "
        "input; a graph has one more operation for each of these inputs. 'free': 'all' for a pipeline of quantized "
        "modules (quantize_pipeline) whose balancing is chosen by the error ('auto'), and 'folded' elsewhere.",
    )
    couple_blocks: bool = Field(
        default=False,
        description="true: also balance layers that must share one factor across blocks, such as the cross-attention "
        "layers of all blocks behind one caption projection. false: leave them unbalanced.",
    )
    vector_multiply: bool = Field(
        default=True,
        description="true: allow folds that add one multiplication of a modulation vector per call, where one layer "
        "modulates all blocks (adaLN-single). false: leave these layers unbalanced. All other folds cost nothing at "
        "run time.",
    )
    min_variables: Count = Field(
        default=4, description="Least number of channels with their own factor; layers with fewer are not balanced."
    )
    verify: bool = Field(
        default=True,
        description="true: check that the balanced float model computes the same output as before. false: do not "
        "check.",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_the_method(cls, data: object) -> object:
        if isinstance(data, Mapping) and "aggregation" in data:
            raise _rule("the key 'aggregation' is called 'method' now; rename it")
        return data


class Rounding(_Section):
    """Rounding of weights, and choice of quantization ranges, after balancing."""

    method: RoundingMethod = Field(
        default="nearest",
        description="Method that rounds the weights. 'nearest' rounds to nearest. 'gptq' rounds weights and corrects "
        "biases to keep the layer's output on the calibration data. 'adaround' learns for all weights of a block "
        "whether to round up or down; it needs sequential: true.",
    )
    ranges: Ranges = Field(
        default="minmax",
        description="Choice of the quantization ranges. 'minmax' covers every value seen. 'output' clips tails where "
        "that reduces the error of the layer's output. 'percentile' (PTQ4DiT, RepQ-ViT) and 'lp' (PTQ4DM, Q-Diffusion) "
        "search for the range with the least error of the values.",
    )
    cutting: Cutting = Field(
        default=1.0,
        description="Weight of the square error of activations that ranges: output cuts off, 1 or more. Errors of "
        "rounding count once. 'auto': 16 where weights and activations have 8 bits, 1 where only weights have fewer, "
        "and 4 where activations have fewer.",
    )
    sequential: bool = Field(
        default=False,
        description="true: round layer by layer, each for the inputs that the quantized network gives it and towards "
        "the float network's output. false: round in one pass, from statistics of the float network.",
    )
    tokens: Count = Field(
        default=32768,
        description="Number of calibration tokens (rows of a linear layer's input) that sequential rounding runs. Its "
        "memory grows with this number.",
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Damping of GPTQ: the fraction of its mean that is added to the diagonal of the inputs' second "
        "moment. Above 0, at most 1.",
    )
    start: Start = Field(
        default="nearest",
        description="Rounding that 'adaround' starts from: 'nearest' (the float weight) or 'gptq' (GPTQ's result).",
    )
    steps: Count = Field(default=20_000, description="Number of optimizer steps of 'adaround' for each block.")
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Time limit of 'adaround' for all blocks together, in minutes. With a limit, results depend on the "
        "speed of the machine. If left out, there is no limit.",
    )

    @model_validator(mode="after")
    def _learns_in_sequence(self) -> Self:
        if self.method == "adaround" and not self.sequential:
            raise PydanticCustomError(
                "recipe_rule", "method 'adaround' learns block by block; add sequential: true", {}
            )
        return self


class Distillation(_Section):
    """Distillation of the whole quantized network from the float network, after its weights have been rounded."""

    steps: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Number of optimizer steps, each on 'calibration.batch_size' images. They update the integers, "
        "scales, biases and ranges of all layers. 0: no distillation. Needs rounding.sequential: true.",
    )
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Time limit of distillation, in minutes. With a limit, results depend on the speed of the machine. "
        "If left out, there is no limit.",
    )


_NOT_WITH_SKIP = ("weight_bits", "activation_bits", "dynamic", "balance")


class Override(_Section):
    """An exception for the modules whose name matches ``pattern``: either ``skip``, or any of the other keys."""

    # The two rules of `_asks_for_one_thing`, for editors: exactly one of "skip" and "any of the other keys".
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["skip"]}, {"anyOf": [{"required": [name]} for name in _NOT_WITH_SKIP]}]
        }
    )

    pattern: str = Field(
        min_length=1,
        description="Shell-style pattern (fnmatch) for module names, such as 'transformer_blocks.0.*'. A '*' also "
        "matches dots.",
    )
    skip: OnlyTrue | None = Field(
        default=None, description="true: keep these modules in float. It excludes the other keys."
    )
    weight_bits: Bits | None = Field(
        default=None, description="Width of these modules' weights in bits, 2 to 8. If left out, that of 'weights'."
    )
    activation_bits: ActivationBits | None = Field(
        default=None,
        description="Width of these modules' activations in bits, 2 to 8, or 16 to keep them float. If left out, that "
        "of 'activations'.",
    )
    dynamic: DynamicOrNot | None = Field(
        default=None,
        description="'token': every token of these modules' inputs has a range of its own. false: they have one range. "
        "If left out, as 'activations' says.",
    )
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
        if self.activation_bits == 16 and self.dynamic:
            raise _rule(
                "pattern '{pattern}' keeps activations float (activation_bits: 16) and dynamic; keep one of them",
                pattern=self.pattern,
            )
        return self


class NormalDraw(_Section):
    """Random calibration timesteps as in PTQ4DM: each image is observed at timesteps of its own."""

    draw: Literal["normal"] = Field(
        description="Distribution of the positions in the schedule. 'normal' is the only one."
    )
    mean: float = Field(
        default=0.4,
        description="Mean of the positions, as a fraction of the schedule. 0 is the last step, with the least noise.",
    )
    std: float = Field(
        default=0.4, ge=0, description="Standard deviation of the positions, as a fraction of the schedule."
    )
    count: Count = Field(
        default=1024, description="Number of positions to draw in total, at least the number of images."
    )


def _count_list_or_draw(value: object) -> str:
    return "drawn" if isinstance(value, Mapping | NormalDraw) else count_or_list(value)


class Size(_Section):
    """A size of calibration images."""

    height: Count | None = Field(default=None, description="Height in pixels. If left out, the pipeline's own.")
    width: Count | None = Field(default=None, description="Width in pixels. If left out, the pipeline's own.")
    num_frames: Count | None = Field(
        default=None, description="Number of frames of a video. If left out, the pipeline's own."
    )

    @property
    def arguments(self) -> dict[str, int]:
        """The given ones, as arguments of a pipeline."""
        return self.model_dump(exclude_none=True)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.arguments:
            raise _rule("a size is empty; give it a height, a width or num_frames")
        return self


class Calibration(_Section):
    """Calibration samples, from which the activation statistics are taken."""

    timesteps: Annotated[
        Annotated[Count, Tag("count")] | Annotated[TimestepList, Tag("list")] | Annotated[NormalDraw, Tag("drawn")],
        Discriminator(_count_list_or_draw),
    ] = Field(
        default=25,
        description="Timesteps to observe: their number, evenly spaced over the sampler's steps; a list of them "
        "(different numbers, 0 or more); or a mapping with 'draw', which draws them for each image.",
    )
    samples: Count = Field(default=16, description="Number of images at each timestep.")
    batch_size: Count = Field(
        default=16,
        description="Number of images sampled at a time. Calibration runs twice as many rows at a time, as guidance "
        "does.",
    )
    steps: Count = Field(default=50, description="Number of steps of the sampler that generates the images.")
    sampler: Sampler | None = Field(
        default=None,
        description="Sampler of class-conditional models: 'ddim' or 'ddpm', or 'flow' if they predict velocity. Choose "
        "the one that the quantized model will be used with. If left out, the pipeline's own.",
    )
    guidance: float = Field(default=1.5, ge=0, description="Classifier-free guidance scale of the sampler, 0 or more.")
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description="Prompts of a text-to-image or text-to-video pipeline. They repeat from the first if there are "
        "more samples than prompts.",
    )
    height: Count | None = Field(
        default=None, description="Height of the images in pixels. If left out, the pipeline's own."
    )
    width: Count | None = Field(
        default=None, description="Width of the images in pixels. If left out, the pipeline's own."
    )
    num_frames: Count | None = Field(
        default=None, description="Number of frames of a video. If left out, the pipeline's own."
    )
    sizes: Annotated[tuple[Size, ...], Field(min_length=1), BeforeValidator(as_tuple)] | None = Field(
        default=None,
        description="Sizes of the images, of which each image has one, in turn; those of 'evaluation', too. Every key "
        "stands either here or beside 'sizes'. If left out, all images have one size.",
    )
    seed: Seed = Field(default=0, description="Seed of class labels and starting noise, 0 to 2^32 - 1.")

    @model_validator(mode="after")
    def _says_sizes_once(self) -> Self:
        sizes = self.sizes or ()
        for index, size in enumerate(sizes):
            if size in sizes[:index]:
                raise _rule("size {size} stands more than once in sizes; keep one of them", size=show(size.arguments))
            for name in size.arguments:
                if getattr(self, name) is not None:
                    raise _rule("{name} stands in sizes and beside them; remove one of them", name=name)
        return self

    @property
    def size(self) -> dict[str, int]:
        """The size of all images, as arguments of a pipeline; what ``sizes`` gives is not among them."""
        return {name: value for name in Size.model_fields if (value := getattr(self, name)) is not None}

    @property
    def rows(self) -> int:
        """Number of rows that calibration and evaluation run at a time."""
        return 2 * self.batch_size


class Evaluation(_Section):
    """Samples on which the quantized model is compared with the float model."""

    timesteps: Timesteps = Field(
        default=20,
        description="Timesteps to compare at: their number, evenly spaced over the sampler's steps, or a list of them "
        "(different numbers, 0 or more).",
    )
    samples: Count = Field(default=32, description="Number of images at each timestep.")
    seed: Seed = Field(
        default=1000,
        description="Seed of class labels and starting noise, 0 to 2^32 - 1. Choose it different from "
        "calibration.seed.",
    )
    leave_one_out: bool = Field(
        default=True,
        description="true: measure the error that each layer causes, by restoring one layer at a time to float. false: "
        "do not measure it.",
    )


class NoiseCorrection(_Section):
    """Correction of the predicted noise in the scheduler (PTQD), for class-conditional models."""

    images: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Number of images along whose trajectories the correction is fitted; some hundred are enough. 0: "
        "no correction. Steps and guidance are those of 'calibration'.",
    )
    seed: Seed = Field(
        default=2000,
        description="Seed of the noise of these images, 0 to 2^32 - 1. Choose it different from the other seeds.",
    )


class Recipe(_Section):
    """A complete description of how a model is quantized. All sections are optional: ``Recipe()`` is W8A8 with SSC.

    A wrong value raises pydantic's ``ValidationError`` where a recipe is built in Python, and ``RecipeError`` where it
    is read from a dict or a file.
    """

    version: Version = Field(default=1, description="Version of the recipe format; this release reads 1.")
    description: str = Field(default="", description="One line on the purpose of the recipe.")
    model: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Model to quantize: 'reference', 'fashion' or 'flow' (they come with the package), the path of a "
        "diffusers model folder, or 'package.module:function'.",
    )
    weights: Weights = Weights()
    activations: Activations = Activations()
    attention: Attention = Attention()
    balance: Balance = Balance()
    rounding: Rounding = Rounding()
    distillation: Distillation = Distillation()
    layers: LayerPreset = Field(
        default="safe",
        description="Preset of layers that differ from the others. 'safe' keeps the embedders and the final layer in "
        "float. 'paper' quantizes them, too, but the final layer's weights to 8 bits.",
    )
    overrides: Annotated[tuple[Override, ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description="Exceptions for modules, matched by name. Where several patterns match, the later one wins.",
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

    @model_validator(mode="after")
    def _balances_what_is_dynamic(self) -> Self:
        if self.balance.method == "repq" and (self.activations.dynamic or any(o.dynamic for o in self.overrides)):
            raise _rule(
                "balance.method 'repq' gives all channels one static range, and activations are dynamic; balance with "
                "another method, or leave dynamic out"
            )
        return self

    @model_validator(mode="after")
    def _has_an_image_of_each_size(self) -> Self:
        sizes = len(self.calibration.sizes or ())
        for name, section in (("calibration", self.calibration), ("evaluation", self.evaluation)):
            if section.samples < sizes:
                raise _rule(
                    "{name}.samples is {samples}, and calibration.sizes holds {sizes} sizes; sample at least one image "
                    "of each, or leave sizes out",
                    name=name,
                    samples=section.samples,
                    sizes=sizes,
                )
        return self

    @model_validator(mode="after")
    def _has_what_its_keys_are_for(self) -> Self:
        weights, balance, rounding = self.weights, self.balance, self.rounding
        if weights.group is not None and weights.levels != "normal":
            raise _rule(
                "weights.group is for levels: normal, and levels is {levels}; change one of them", levels=weights.levels
            )
        if balance.center and balance.method in ("none", "repq"):
            raise _rule(
                "balance.center is true, and method '{method}' {why}; set center: false, or take another method",
                method=balance.method,
                why="balances nothing" if balance.method == "none" else "shifts inputs itself",
            )
        if rounding.cutting != 1 and rounding.ranges != "output":
            raise _rule(
                "rounding.cutting is for ranges: output, and ranges is {ranges}; change one of them",
                ranges=rounding.ranges,
            )
        return self

    @property
    def widths(self) -> str:
        """Bits of weights and activations, such as ``W4A8``; ``W4-8A8`` where some layers have other bits."""
        return f"W{_span(self.weight_widths)}A{_span(self.activation_widths)}"

    @property
    def weight_widths(self) -> set[int]:
        """Bits of the weights of all layers, overrides included."""
        weights = self.weights.widths if self.weights.bits == "auto" else (self.weights.bits,)
        return {*weights, *(o.weight_bits for o in self.overrides if o.weight_bits is not None)}

    @property
    def activation_widths(self) -> set[int]:
        """Bits of the activations of all layers, overrides included."""
        return {self.activations.bits} | {o.activation_bits for o in self.overrides if o.activation_bits}

    def to_dict(self) -> dict[str, object]:
        """The whole recipe with its defaults, as a dict that ``json.dump`` writes and ``from_dict`` reads back."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        """The recipe as the text of a recipe file."""
        return write_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, object], *, name: str = "recipe") -> Self:
        """Read a dict that ``to_dict`` made.

        A ``RecipeError`` lists every problem, each prefixed with the recipe's name.
        """
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
    """A recipe as one YAML file holds it, before its base is merged in."""

    version: Version = Field(description="Version of the recipe format; this release reads 1.")
    extends: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Recipe that this one builds on: a path relative to this file, or the name of a shipped recipe. "
        "Mappings are merged key by key. Scalars and lists replace those of the base.",
    )

    @model_validator(mode="after")
    def _distills_what_was_rounded(self) -> Self:
        return self  # the base may have the other key

    @model_validator(mode="after")
    def _balances_what_is_dynamic(self) -> Self:
        return self  # the same

    @model_validator(mode="after")
    def _has_an_image_of_each_size(self) -> Self:
        return self  # the same

    @model_validator(mode="after")
    def _has_what_its_keys_are_for(self) -> Self:
        return self  # the same


def _span(bits: set[int]) -> str:
    low, high = min(bits), max(bits)
    return str(low) if low == high else f"{low}-{high}"
