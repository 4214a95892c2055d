"""Invalid calls of the public Python functions: name, number, call, exception, and text that its message contains."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao import (
    BalanceSettings,
    CalibrationSamples,
    Expansion,
    Override,
    PTQ4DiTQuantizer,
    QuantizedModel,
    Recipe,
    SalienceStatistics,
    SitePolicy,
    apply_recipe,
    as_diffusers_transformer,
    as_fast_module,
    balance,
    balance_module,
    balance_result,
    choose_weight_bits,
    collect_components,
    collect_from_pipeline,
    collect_salience,
    distill,
    export_transformer,
    find_sites,
    free_sizes,
    load_quantized,
    load_recipe,
    load_reference_classifier,
    load_reference_dit,
    lower,
    prove_kernels,
    quantize_pipeline,
    round_sequentially,
    salience_statistics,
    save_quantized,
    to_module,
)
from ptq4dit_ao.calibration import Sampling, SamplingPipeline
from ptq4dit_ao.errors import (
    ArgumentError,
    ArtifactError,
    BalanceError,
    CalibrationError,
    ExportError,
    LoweringError,
    OverrideError,
    PTQ4DiTError,
    RecipeError,
)
from ptq4dit_ao.evaluation.bench.random_dit import randomize_

MODELS = """
from diffusers import DiTTransformer2DModel

from ptq4dit_ao.evaluation.bench.random_dit import randomize_


def pixels():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )
    return randomize_(model, seed=0)
"""
MODULE = "models_for_bad_inputs"
Batch = tuple[Tensor, ...]


class WithoutLinears(nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x * 2


class WithComplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (x * self.turn).real


class Failing(nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        raise KeyError("inside")


@dataclass
class Workshop:
    """A tiny model with all that is made of it, each once."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / f"{MODULE}.py").write_text(MODELS)
        sys.path.insert(0, str(self.folder))

    def model(self) -> nn.Module:
        from importlib import import_module

        model: nn.Module = import_module(MODULE).pixels()
        return randomize_(model, seed=0).eval().requires_grad_(False)

    @cached_property
    def float_model(self) -> nn.Module:
        return self.model()

    @cached_property
    def batches(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)
        t, y = torch.arange(4) * 100, torch.arange(4)
        return [(torch.randn(4, 1, 8, 8, generator=generator), t, y) for _ in range(2)]

    def batch(self, x: Tensor | None = None, **changed: Any) -> Batch:
        first, t, y = self.batches[0]
        return (first if x is None else x, changed.get("t", t), changed.get("y", y))

    def filled(self, value: float) -> Batch:
        return self.batch(torch.full((4, 1, 8, 8), value))

    @cached_property
    def graph(self) -> GraphModule:
        return export_transformer(self.float_model, self.batches[0])

    @cached_property
    def quantized(self) -> QuantizedModel:
        return apply_recipe(self.graph, Recipe(), self.batches)

    @cached_property
    def statistics(self) -> SalienceStatistics:
        return collect_salience(self.graph, self.batches)

    @cached_property
    def pipeline(self) -> SamplingPipeline:
        return SamplingPipeline(self.float_model, Sampling.of(self.float_model))

    @cached_property
    def artifact(self) -> Path:
        self.quantized.save(self.folder / "artifact")
        return self.folder / "artifact"

    def prepared(self, *, run: bool = True, **options: Any) -> GraphModule:
        graph = GraphModule(self.graph, copy.deepcopy(self.graph.graph))
        prepared = prepare_pt2e(graph, PTQ4DiTQuantizer(**options))
        for batch in self.batches if run else ():
            prepared(*batch)
        return prepared

    def collect(self, prompts: Any = (1,), *, pipeline: Any = None, **options: Any) -> CalibrationSamples:
        settings = {"timesteps": 1, "steps": 2, **options}
        return collect_from_pipeline(pipeline or self.pipeline, prompts, **settings)


Bad = tuple[Callable[[Workshop], object], type[PTQ4DiTError], str]
NOTHING = "is of type NoneType; give"
EMPTY = r"is '', which is no path; give a name"
GRAPH = "give a graph of export_transformer"


def samples(**inputs: Any) -> CalibrationSamples:
    return CalibrationSamples(inputs or {"x": torch.zeros(2)})


BAD: dict[str, list[Bad]] = {
    "BalanceSettings": [
        (lambda w: BalanceSettings(alpha=2), ArgumentError, r"alpha is 2; it must lie in \[0, 1\]"),
        (lambda w: BalanceSettings(alpha=float("nan")), ArgumentError, r"alpha is nan; it must lie in \[0, 1\]"),
        (lambda w: BalanceSettings(alpha="x"), ArgumentError, "alpha is 'x'; choose one of auto"),
        (lambda w: BalanceSettings(alpha=None), ArgumentError, f"alpha {NOTHING} a number from 0 to 1"),
        (lambda w: BalanceSettings(max_scale=0), ArgumentError, "max_scale is 0; it must be at least 1"),
        (lambda w: BalanceSettings(max_scale="a"), ArgumentError, r"max_scale is 'a' \(str\); give a number"),
        (lambda w: BalanceSettings(method="x"), ArgumentError, "method is 'x'; choose one of ssc, max"),
        (lambda w: BalanceSettings(method=None), ArgumentError, "method is None; choose one of"),
        (lambda w: BalanceSettings(fold_form="x"), ArgumentError, "fold_form is 'x'; choose one of constant, bias"),
    ],
    "CalibrationSamples": [
        (lambda w: CalibrationSamples({}), CalibrationError, "need one common, non-zero number of rows, got {}"),
        (lambda w: CalibrationSamples(None), ArgumentError, f"inputs {NOTHING} a dict of tensors by input name"),
        (lambda w: samples(x=[1, 2]), ArgumentError, "input 'x' is of type list; give a tensor whose first axis"),
        (lambda w: samples(x="ab"), ArgumentError, r"input 'x' is 'ab' \(str\); give a tensor"),
        (lambda w: samples(x=torch.zeros(2), t=torch.zeros(3)), CalibrationError, "rows, got {'x': 2, 't': 3}"),
        (lambda w: samples(x=torch.zeros(0, 2)), CalibrationError, "non-zero number of rows, got {'x': 0}"),
        (lambda w: samples(x=torch.tensor(1.0)), CalibrationError, "non-zero number of rows, got {'x': 0}"),
        (lambda w: CalibrationSamples.load("no"), CalibrationError, "from no: No such file .*; check the path, or"),
        (lambda w: CalibrationSamples.load(w.folder), CalibrationError, "it is a folder; give the name of a file"),
        (lambda w: CalibrationSamples.load(""), ArgumentError, f"path {EMPTY}"),
        (lambda w: CalibrationSamples.load(None), ArgumentError, f"path {NOTHING} a path as text"),
        (lambda w: samples().save(w.folder), CalibrationError, "it is a folder; give the name of a file in it"),
        (lambda w: samples().save("/proc/no/x"), CalibrationError, "No such file .*; choose a place that you may"),
        (lambda w: list(samples().batches(0)), ArgumentError, "size is 0; give a whole number of rows, at least 1"),
        (lambda w: list(samples().batches(-1)), ArgumentError, "size is -1; give a whole number of rows, at least 1"),
        (lambda w: samples().spread(0), ArgumentError, "rows is 0; give a whole number of rows, at least 1"),
    ],
    "Override": [
        (
            lambda w: Override(pattern="a"),
            OverrideError,
            "override 'a' changes nothing; set skip, bits, dynamic or balance",
        ),
        (lambda w: Override(pattern="a", weight_bits=3.5), ArgumentError, "weight_bits is 3.5; it must be an integer"),
        (lambda w: Override(pattern="a", weight_bits=9), ArgumentError, "weight_bits is 9; it must be an integer"),
        (lambda w: Override(pattern="a", activation_bits=True), ArgumentError, "activation_bits is True; it must be"),
        (lambda w: Override(pattern="a", skip=True, weight_bits=4), OverrideError, "skips a layer and sets its bits"),
        (lambda w: Override(pattern=None, skip=True), OverrideError, "pattern of an override is None; give the name"),
        (lambda w: Override(pattern="", skip=True), OverrideError, "pattern of an override is ''; give the name"),
    ],
    "PTQ4DiTQuantizer": [
        (lambda w: PTQ4DiTQuantizer(weight_bits=1), ArgumentError, "weight_bits is 1; it must be an integer from 2"),
        (lambda w: PTQ4DiTQuantizer(weight_bits="8"), ArgumentError, "weight_bits is '8'; it must be an integer"),
        (lambda w: PTQ4DiTQuantizer(activation_bits=9), ArgumentError, "activation_bits is 9; it must be"),
        (lambda w: PTQ4DiTQuantizer(attention_bits=0), ArgumentError, "attention_bits is 0; it must be"),
        (lambda w: PTQ4DiTQuantizer(dynamic="row"), ArgumentError, "dynamic is 'row'; give 'token'"),
        (lambda w: PTQ4DiTQuantizer(balance="x"), ArgumentError, "balance is 'x'; choose one of"),
        (lambda w: PTQ4DiTQuantizer(alpha=-1), ArgumentError, "alpha is -1; it must lie in"),
        (lambda w: PTQ4DiTQuantizer(rounding="x"), ArgumentError, "rounding is 'x'; choose one of nearest, gptq"),
        (lambda w: PTQ4DiTQuantizer(rounding=None), ArgumentError, f"rounding {NOTHING} its name, or RoundingSettings"),
        (lambda w: PTQ4DiTQuantizer(rounding="adaround"), ArgumentError, "pass sequential=True with it"),
        (lambda w: PTQ4DiTQuantizer(layers="safe"), ArgumentError, r"an item of layers is 's' \(str\); give an Overr"),
        (lambda w: PTQ4DiTQuantizer(overrides=[{}]), ArgumentError, "an item of overrides is of type dict; give an"),
        (lambda w: PTQ4DiTQuantizer("x"), ArgumentError, r"base is 'x' \(str\); give a quantizer of torchao"),
        (lambda w: PTQ4DiTQuantizer(policy="x"), ArgumentError, r"policy is 'x' \(str\); give a SitePolicy"),
        (lambda w: w.prepared(timestep_input="no"), ArgumentError, "timestep_input is 'no', but the graph's inputs"),
        (
            lambda w: w.prepared(overrides=[Override(pattern="no*", skip=True)]),
            OverrideError,
            r"override 'no\*' matches none of the model's 13 linear layers",
        ),
        (
            lambda w: w.prepared(overrides=[Override(pattern="*", skip=True)]),
            BalanceError,
            "no linear layer is left to quantize; check 'layers', the overrides",
        ),
        (lambda w: convert_pt2e(w.prepared(run=False)), CalibrationError, "was never run: call the prepared model on"),
    ],
    "QuantizedModel": [
        (lambda w: w.quantized.lower("no"), LoweringError, "backend 'no' is unknown; there are"),
        (lambda w: w.quantized.lower("fbgemm", float_dtype="half"), LoweringError, "in half .*leave float_dtype out"),
        (lambda w: w.quantized.save(""), ArgumentError, f"directory {EMPTY}"),
    ],
    "Recipe": [
        (lambda w: Recipe.from_dict({"a": 1}), RecipeError, "version: missing; add 'version: 1'"),
        (lambda w: Recipe.from_dict(None), RecipeError, "null is not a mapping; give what Recipe.to_dict returned"),
        (lambda w: Recipe.from_dict([1]), RecipeError, r"\[1\] is not a mapping; give what"),
        (
            lambda w: Recipe.from_dict({"version": 1, "weights": {"bits": 9}}),
            RecipeError,
            "weights.bits: 9 is not allowed; it must be a whole number from 2 to 8",
        ),
    ],
    "SalienceStatistics": [
        (lambda w: SalienceStatistics("x"), ArgumentError, r"tables is 'x' \(str\); give a dict of ChannelStatistics"),
        (lambda w: SalienceStatistics.load("no"), CalibrationError, "from no: No such file .*, or run calibration"),
        (lambda w: SalienceStatistics.load(""), ArgumentError, f"path {EMPTY}"),
        (lambda w: w.statistics.save("/proc/no/x"), CalibrationError, "cannot write salience .*; choose a place"),
        (lambda w: w.statistics.merge(SalienceStatistics()), CalibrationError, "statistics of different models"),
        (lambda w: w.statistics.merge(None), ArgumentError, f"other {NOTHING} SalienceStatistics"),
    ],
    "Expansion": [
        (lambda w: Expansion(group=8), ArgumentError, "group is 8; it must be at least 16 channels, or None"),
        (lambda w: Expansion(group="32"), ArgumentError, r"group is '32' \(str\); give a number of channels"),
        (
            lambda w: PTQ4DiTQuantizer(expansion=32),
            ArgumentError,
            r"expansion is 32 \(int\); give an Expansion, or None",
        ),
    ],
    "SitePolicy": [
        (lambda w: SitePolicy(min_variables=-1), ArgumentError, "min_variables is -1; it must be at least 1"),
        (lambda w: SitePolicy(min_variables="4"), ArgumentError, r"min_variables is '4' \(str\); give a whole number"),
        (lambda w: SitePolicy(couple_blocks="no"), ArgumentError, r"couple_blocks is 'no' \(str\); give True or False"),
    ],
    "apply_recipe": [
        (lambda w: apply_recipe(None, Recipe(), w.batches), ExportError, "NoneType is not a torch module; pass the"),
        (
            lambda w: apply_recipe(w.graph, "auto", w.batches),
            ArgumentError,
            r"recipe is 'auto' \(str\); give what load_",
        ),
        (lambda w: apply_recipe(w.graph, Recipe(), []), CalibrationError, "no calibration samples; pass at least one"),
        (lambda w: apply_recipe(w.graph, Recipe(), None), ArgumentError, f"samples {NOTHING} what collect_from_pip"),
        (lambda w: apply_recipe(w.graph, Recipe(), "a.st"), CalibrationError, "batch 1 is a str; give a tuple of ten"),
        (
            lambda w: apply_recipe(w.graph, Recipe(), w.batches[0]),
            CalibrationError,
            r"batch 1 is a Tensor; give a tuple of tensors, one for each input \(hidden_states, timestep, class_labels",
        ),
        (
            lambda w: apply_recipe(w.graph, Recipe(), [w.filled(float("nan"))]),
            CalibrationError,
            "attn1.to_q' has NaN or infinite values at timestep .*; look at that calibration sample",
        ),
        (
            lambda w: apply_recipe(w.graph, Recipe(), [w.filled(float("inf"))]),
            CalibrationError,
            "NaN or infinite values",
        ),
        (
            lambda w: apply_recipe(w.graph, Recipe(), [w.batch(torch.zeros(4, 1, 4, 8))]),
            CalibrationError,
            r"hidden_states of calibration batch 1 has shape \(4, 1, 4, 8\), and the graph was captured for \(N, 1, he",
        ),
        (
            lambda w: apply_recipe(w.graph, Recipe(), [w.batch(torch.zeros(4, 1, 8, 8).double())]),
            CalibrationError,
            r"cannot run on calibration batch 1: .*double.*; check the types and values",
        ),
        (
            lambda w: apply_recipe(w.graph, Recipe(), [w.batches[0][:2]]),
            CalibrationError,
            "has 2 tensors, and the graph",
        ),
        (
            lambda w: apply_recipe(w.graph, Recipe(), [tuple(x[:0] for x in w.batches[0])]),
            CalibrationError,
            r"has shape \(0, 1, 8, 8\), which is empty; leave that batch out",
        ),
        (
            lambda w: apply_recipe(w.graph, Recipe(), [w.batch(y=torch.full((4,), 99))]),
            CalibrationError,
            "cannot run on calibration batch 1: IndexError: index out of range",
        ),
        (lambda w: apply_recipe(w.model().train(), Recipe(), w.batches), ExportError, "training mode; call .eval()"),
        (lambda w: apply_recipe(WithoutLinears().eval(), Recipe(), w.batches), PTQ4DiTError, "no linear layer is left"),
        (lambda w: apply_recipe(WithComplex().eval(), Recipe(), w.batches), PTQ4DiTError, "no linear layer is left"),
        (
            lambda w: apply_recipe(Failing().eval(), Recipe(), w.batches),
            ExportError,
            "cannot run on the example.*inside",
        ),
        (lambda w: apply_recipe(w.graph, Recipe(), w.batches, base="x"), ArgumentError, r"base is 'x' \(str\); give"),
        (
            lambda w: apply_recipe(w.graph, Recipe(), w.batches, timestep_input="no"),
            ArgumentError,
            "timestep_input is 'no', but the graph's inputs are",
        ),
        (
            lambda w: apply_recipe(w.graph, load_recipe("auto"), w.batches, resume="/proc/version"),
            CalibrationError,
            "cannot keep rounded layers in /proc/version: File exists .*; remove it to start again",
        ),
        (
            lambda w: apply_recipe(w.graph, load_recipe("auto"), w.batches, resume=""),
            ArgumentError,
            f"resume {EMPTY}",
        ),
    ],
    "as_diffusers_transformer": [
        (
            lambda w: as_diffusers_transformer(None),
            ArgumentError,
            f"quantized {NOTHING} what apply_recipe or load_quan",
        ),
        (lambda w: as_diffusers_transformer(w.graph), ArgumentError, "quantized is of type GraphModule; give what"),
        (lambda w: as_diffusers_transformer(w.quantized, backend="no"), LoweringError, "backend 'no' is unknown"),
    ],
    "as_fast_module": [
        (lambda w: as_fast_module(None), ArgumentError, f"module {NOTHING} a module of diffusers that was quantized"),
        (
            lambda w: as_fast_module(w.float_model),
            ArgumentError,
            "has an Int8Tensor with a static range; give a module",
        ),
    ],
    "balance": [
        (lambda w: balance(None, w.statistics), ArgumentError, f"exported {NOTHING} a graph of export_transformer"),
        (lambda w: balance(w.float_model, w.statistics), ArgumentError, GRAPH),
        (lambda w: balance(w.graph, None), ArgumentError, f"statistics {NOTHING} what collect_salience returned"),
        (lambda w: balance(w.graph, SalienceStatistics()), CalibrationError, "was never run: call the prepared model"),
        (
            lambda w: balance(w.graph, w.statistics, "x"),
            ArgumentError,
            r"settings is 'x' \(str\); give BalanceSettings",
        ),
        (lambda w: balance(w.graph, w.statistics, exclude=["*"]), BalanceError, "all its linear layers are excluded"),
        (
            lambda w: balance(w.graph, w.statistics, exclude="a"),
            ArgumentError,
            "exclude is the string 'a'; give a list",
        ),
    ],
    "balance_module": [
        (lambda w: balance_module(None, w.graph, w.statistics), ArgumentError, f"model {NOTHING} the module that was"),
        (lambda w: balance_module(w.model(), w.graph, w.statistics), ArgumentError, "is not the module's; export this"),
        (lambda w: balance_module(w.graph, w.float_model, w.statistics), ArgumentError, GRAPH),
        (lambda w: balance_module(w.float_model, w.graph, SalienceStatistics()), CalibrationError, "was never run"),
    ],
    "balance_result": [
        (lambda w: balance_result(None), ArgumentError, f"model {NOTHING} a graph that was converted or balanced"),
        (lambda w: balance_result(w.graph), BalanceError, "neither converted with PTQ4DiTQuantizer nor balanced"),
    ],
    "choose_weight_bits": [
        (lambda w: choose_weight_bits(None, w.batches, average_bits=5), ArgumentError, GRAPH),
        (lambda w: choose_weight_bits(w.graph, [], average_bits=5), CalibrationError, "no calibration samples; pass"),
        (lambda w: choose_weight_bits(w.graph, w.batches, average_bits=1), ArgumentError, "average_bits is 1, and the"),
        (lambda w: choose_weight_bits(w.graph, w.batches, average_bits="5"), ArgumentError, r"average_bits is '5' \(s"),
        (
            lambda w: choose_weight_bits(w.graph, w.batches, average_bits=5, candidates=(4,)),
            ArgumentError,
            r"candidates are \[4\]; give at least two",
        ),
        (
            lambda w: choose_weight_bits(w.graph, w.batches, average_bits=5, candidates="48"),
            ArgumentError,
            "a candidate for weight_bits is '4'; it must be an integer",
        ),
    ],
    "collect_components": [
        (lambda w: collect_components(w.pipeline, [1], {}), ArgumentError, "components is empty; give at least one"),
        (lambda w: collect_components(w.pipeline, [1], "transformer"), ArgumentError, "components is 'transformer'"),
        (
            lambda w: collect_components(w.pipeline, [1], {"unet": 2}),
            CalibrationError,
            "has no module 'unet' to record",
        ),
        (lambda w: collect_components("x", [1], {"unet": 2}), ArgumentError, "pipeline is of type str; give a pipel"),
    ],
    "collect_from_pipeline": [
        (lambda w: w.collect(pipeline="x"), ArgumentError, "pipeline is of type str; give a pipeline of diffusers"),
        (lambda w: w.collect("abc"), ArgumentError, "prompts is the string 'abc'; give a list of them"),
        (lambda w: w.collect([]), ArgumentError, "prompts is empty; give at least one"),
        (lambda w: w.collect(["cat"]), ArgumentError, "text 'cat', and SamplingPipeline is class-conditional; give cl"),
        (lambda w: w.collect([99]), ArgumentError, "prompts holds class 99, and the model knows 0 to 10"),
        (lambda w: w.collect(timesteps=0), CalibrationError, "0 calibration timesteps asked for; ask for at least 1"),
        (lambda w: w.collect(timesteps=5), CalibrationError, "5 calibration timesteps asked for, the sampler has 2"),
        (lambda w: w.collect(timesteps=[]), CalibrationError, "list of calibration timesteps is empty; name at least"),
        (lambda w: w.collect(timesteps=[3]), CalibrationError, "never visits timestep 3; the nearest it visits is 0"),
        (lambda w: w.collect(timesteps=[float("nan")]), ArgumentError, "calibration timesteps holds nan; give finite"),
        (lambda w: w.collect(timesteps="3"), ArgumentError, "timesteps is '3'; give how many, a list"),
        (lambda w: w.collect(timesteps=None), ArgumentError, "timesteps is None; give how many"),
        (lambda w: w.collect(timesteps=2.5), ArgumentError, "timesteps is 2.5; give how many"),
        (lambda w: w.collect(steps=0), ArgumentError, "steps is 0; it must be at least 1"),
        (lambda w: w.collect(steps=5000), CalibrationError, "DDIMScheduler cannot take 5000 steps"),
        (lambda w: w.collect(steps="2"), ArgumentError, r"steps is '2' \(str\); give a whole number"),
        (lambda w: w.collect(steps=2.5), ArgumentError, r"steps is 2.5 \(float\); give a whole number"),
        (lambda w: w.collect(batch_size=-1), ArgumentError, "batch_size is -1; it must be at least 1"),
        (lambda w: w.collect(component="unet"), CalibrationError, "no module 'unet' to record; give component= one"),
        (lambda w: w.collect(component=None), ArgumentError, f"component {NOTHING} the name of the pipeline's module"),
        (lambda w: w.collect(seed="x"), ArgumentError, r"seed is 'x' \(str\); give a whole number"),
        (lambda w: w.collect(seed=2**70), ArgumentError, "seed is 1180591620717411303424; it must be .*below 2"),
        (lambda w: w.collect(guidance=float("nan")), ArgumentError, "guidance is nan; it must be finite"),
        (lambda w: w.collect(call="x"), ArgumentError, r"call is 'x' \(str\); give a dict of arguments"),
        (lambda w: w.collect(call={"no": 1}), ArgumentError, "call has 'no', which SamplingPipeline does not take; it"),
    ],
    "collect_salience": [
        (lambda w: collect_salience(None, w.batches), ArgumentError, GRAPH),
        (lambda w: collect_salience(w.graph, []), CalibrationError, "no calibration samples; pass at least one"),
        (lambda w: collect_salience(w.graph, "ab"), CalibrationError, "calibration batch 1 is a str; give a tuple"),
        (lambda w: collect_salience(w.graph, [w.filled(float("nan"))]), CalibrationError, r"on it$"),
        (
            lambda w: collect_salience(w.graph, [w.batches[0][:2]]),
            CalibrationError,
            "has 2 tensors, and the graph takes",
        ),
        (
            lambda w: collect_salience(w.graph, w.batches, timestep_input="x"),
            ArgumentError,
            "timestep_input is 'x', but",
        ),
        (lambda w: collect_salience(w.graph, w.batches, exclude=["*"]), BalanceError, "layers are excluded"),
    ],
    "distill": [
        (lambda w: distill(None, w.batches), ArgumentError, f"prepared {NOTHING} what prepare_pt2e returned"),
        (lambda w: distill(w.graph, w.batches), CalibrationError, "not prepared with PTQ4DiTQuantizer; call prepare"),
        (lambda w: distill(w.prepared(), w.batches), CalibrationError, "prepare with sequential=True, and call"),
        (lambda w: distill(w.prepared(), w.batches, steps=0), ArgumentError, "steps is 0; it must be at least 1"),
        (lambda w: distill(w.prepared(), w.batches, steps="3"), ArgumentError, r"steps is '3' \(str\); give a whole"),
        (lambda w: distill(w.prepared(), w.batches, minutes=-1), ArgumentError, "minutes is -1; it must be above 0"),
    ],
    "export_transformer": [
        (lambda w: export_transformer("x", w.batches[0]), ExportError, "str is not a torch module; pass the float tr"),
        (
            lambda w: export_transformer(WithComplex, w.batches[0]),
            ExportError,
            "type is not a torch module; pass the float transformer",
        ),
        (lambda w: export_transformer(w.model().train(), w.batches[0]), ExportError, "training mode; call .eval()"),
        (lambda w: export_transformer(w.float_model, ()), ExportError, "inputs hold no tensor; give at least one"),
        (lambda w: export_transformer(w.float_model, {}), ExportError, "inputs hold no tensor; give at least one"),
        (lambda w: export_transformer(w.float_model, "ab"), ExportError, "inputs are a str; give a tuple of tensors"),
        (lambda w: export_transformer(w.float_model, w.batches[0][0]), ExportError, "are a Tensor; give a tuple of"),
        (lambda w: export_transformer(w.float_model, ([1], [2])), ExportError, "give a tuple of tensors in the order"),
        (
            lambda w: export_transformer(w.float_model, tuple(x[:1] for x in w.batches[0])),
            ExportError,
            "at least 2 rows",
        ),
        (
            lambda w: export_transformer(w.float_model, w.filled(float("nan"))),
            ExportError,
            "has NaN or infinite values",
        ),
        (
            lambda w: export_transformer(w.float_model, w.batch(torch.zeros(4, 1, 8, 8).long())),
            ExportError,
            "cannot run on the example inputs: .*; check their order, shapes and types",
        ),
        (
            lambda w: export_transformer(w.float_model, tuple(x.to("meta") for x in w.batches[0])),
            ExportError,
            "cannot run on the example inputs: .*device",
        ),
        (lambda w: export_transformer(w.float_model, w.batches[0] * 4), ExportError, "takes 5 inputs .*, got 12"),
        (
            lambda w: export_transformer(w.float_model, {"a": w.batches[0][0]}),
            ArgumentError,
            "no argument 'a'; it takes",
        ),
        (lambda w: export_transformer(w.float_model, {"timestep": object()}), ArgumentError, "only tensors, numbers"),
    ],
    "find_sites": [
        (lambda w: find_sites(None), ArgumentError, f"graph_module {NOTHING} a graph of export_transformer"),
        (lambda w: find_sites(w.float_model), ArgumentError, GRAPH),
        (lambda w: find_sites(w.graph, ["no"]), ArgumentError, "only has 'no', which is no linear node of the graph"),
        (lambda w: find_sites(w.graph, policy="x"), ArgumentError, r"policy is 'x' \(str\); give a SitePolicy"),
    ],
    "free_sizes": [
        (lambda w: free_sizes(None), ArgumentError, f"graph_module {NOTHING} a graph of export_transformer"),
        (lambda w: free_sizes(w.float_model), ArgumentError, GRAPH),
    ],
    "load_quantized": [
        (lambda w: load_quantized("no"), ArtifactError, "there is no folder no; check the path"),
        (lambda w: load_quantized(None), ArgumentError, f"directory {NOTHING} a path as text"),
        (lambda w: load_quantized(""), ArgumentError, f"directory {EMPTY}"),
        (lambda w: load_quantized("a\0b"), ArgumentError, r"directory is 'a\\x00b', which is no path"),
        (lambda w: load_quantized("~nobody_here/x"), ArgumentError, "no such user's home folder; write it out"),
        (lambda w: load_quantized(w.folder), ArtifactError, "has no manifest.json; the folder is not a complete"),
        (lambda w: load_quantized(w.artifact, "no"), LoweringError, "backend 'no' is unknown; there are"),
        (lambda w: load_quantized(w.artifact, 5), ArgumentError, r"backend is 5 \(int\); give its name, or 'auto'"),
        (
            lambda w: load_quantized(w.artifact, "fbgemm", float_dtype=torch.int8),
            LoweringError,
            "leave float_dtype out",
        ),
    ],
    "load_recipe": [
        (lambda w: load_recipe("no"), RecipeError, "recipe 'no': neither a file nor a shipped recipe"),
        (lambda w: load_recipe(""), ArgumentError, f"recipe {EMPTY}"),
        (lambda w: load_recipe(None), ArgumentError, f"recipe {NOTHING} a path as text"),
        (lambda w: load_recipe(w.folder), RecipeError, "neither a file nor a shipped recipe"),
        (lambda w: load_recipe("a" * 5000), RecipeError, "cannot be read: File name too long"),
    ],
    "load_reference_classifier": [
        (lambda w: load_reference_classifier("no"), ArgumentError, "name is 'no'; choose one of digits, fashion"),
        (lambda w: load_reference_classifier(None), ArgumentError, "name is None; choose one of digits, fashion"),
    ],
    "load_reference_dit": [
        (lambda w: load_reference_dit("no"), ArgumentError, "name is 'no'; choose one of digits, fashion"),
        (lambda w: load_reference_dit(3), ArgumentError, "name is 3; choose one of digits, fashion"),
    ],
    "prove_kernels": [
        (lambda w: prove_kernels(None, w.pipeline), ArgumentError, f"module {NOTHING} a quantized module"),
        (lambda w: prove_kernels(w.float_model, None), ArgumentError, f"call {NOTHING} a function that calls"),
        (lambda w: prove_kernels(w.float_model, lambda: None), LoweringError, "no quantized linear was called; call"),
    ],
    "quantize_pipeline": [
        (lambda w: quantize_pipeline(None, Recipe()), ArgumentError, f"pipeline {NOTHING} a pipeline of diffusers"),
        (lambda w: quantize_pipeline(w.float_model, Recipe()), ArgumentError, "give a pipeline of diffusers"),
    ],
    "lower": [
        (lambda w: lower(None), ArgumentError, f"converted {NOTHING} a graph that convert_pt2e returned"),
        (lambda w: lower(w.float_model, "fbgemm"), ArgumentError, "give a graph that convert_pt2e returned"),
        (lambda w: lower(w.graph, "fbgemm"), LoweringError, "no quantized layer that backend 'fbgemm' could run"),
        (lambda w: lower(w.quantized.graph, "no"), LoweringError, "backend 'no' is unknown; there are"),
        (lambda w: lower(w.quantized.graph, None), ArgumentError, f"backend {NOTHING} its name, or 'auto'"),
        (lambda w: lower(w.quantized.graph, example_inputs=()), LoweringError, "has 0 tensors, and the graph takes 3"),
        (
            lambda w: lower(w.quantized.graph, example_inputs="a"),
            LoweringError,
            "example_inputs is a str; give a tuple",
        ),
        (
            lambda w: lower(w.quantized.graph, example_inputs=w.batch(torch.zeros(4, 1, 4, 8))),
            LoweringError,
            r"hidden_states of example_inputs has shape \(4, 1, 4, 8\), and the graph was captured for",
        ),
    ],
    "round_sequentially": [
        (
            lambda w: round_sequentially(None, w.batches),
            ArgumentError,
            f"prepared {NOTHING} what prepare_pt2e returned",
        ),
        (
            lambda w: round_sequentially(w.graph, w.batches),
            CalibrationError,
            "not prepared with PTQ4DiTQuantizer; call",
        ),
        (
            lambda w: round_sequentially(w.prepared(sequential=True), []),
            CalibrationError,
            "no calibration samples; pass",
        ),
        (
            lambda w: round_sequentially(w.prepared(sequential=True), [w.batches[0][:2]]),
            CalibrationError,
            "batch 1 has 2 tensors, and the graph takes 3",
        ),
        (
            lambda w: round_sequentially(w.prepared(sequential=True), w.batches, resume="/proc/no"),
            CalibrationError,
            "cannot keep rounded layers in /proc/no: No such file",
        ),
    ],
    "salience_statistics": [
        (lambda w: salience_statistics(None), ArgumentError, f"prepared {NOTHING} what prepare_pt2e returned"),
        (lambda w: salience_statistics(w.graph), CalibrationError, "not prepared with PTQ4DiTQuantizer; call prepare"),
    ],
    "to_module": [
        (lambda w: to_module(None, w.float_model), ArgumentError, f"quantized {NOTHING} what apply_recipe or load_q"),
        (lambda w: to_module(w.quantized, None), ArgumentError, f"model {NOTHING} the float module that was quantized"),
        (lambda w: to_module(w.quantized, w.graph), ArgumentError, "model is a graph; give the float module"),
        (lambda w: to_module(w.quantized, WithoutLinears()), ArgumentError, r"WithoutLinears cannot hold \d+ of"),
        (
            lambda w: to_module(w.quantized, w.float_model, method="onnx"),
            ArgumentError,
            "method is 'onnx'; choose one of torchao, ptq4dit",
        ),
    ],
    "save_quantized": [
        (lambda w: save_quantized(None, "x"), ArgumentError, f"model {NOTHING} what apply_recipe returned"),
        (lambda w: save_quantized(w.graph, "x"), ArgumentError, "model is of type GraphModule; give what apply_recipe"),
        (lambda w: save_quantized(w.quantized, None), ArgumentError, f"directory {NOTHING} a path as text"),
        (lambda w: save_quantized(w.quantized, ""), ArgumentError, f"directory {EMPTY}"),
        (lambda w: save_quantized(w.quantized, w.folder), ArtifactError, "is not a saved ptq4dit-ao model .*; save to"),
        (lambda w: save_quantized(w.quantized, "/proc/no/x"), ArtifactError, "cannot write /proc/no/x: No such file"),
        (lambda w: save_quantized(w.quantized, "a" * 300), ArtifactError, "File name too long .*; choose a folder"),
    ],
}
