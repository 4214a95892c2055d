"""Any pipeline can be recorded: text prompts, flow matching, guidance in two passes, shared position ids.

First real pipelines of diffusers with tiny transformers and no text encoders, then what each of them may do wrong.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao.calibration import CalibrationSamples, NormalTimesteps, choose_timesteps, collect_from_pipeline
from ptq4dit_ao.calibration.samples import FORMAT
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.testing.zoo import FAMILIES

STEPS, PROMPTS, TOKENS = 5, 3, 7


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- pipelines of diffusers ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline, and what its transformer must have received."""

    family: str
    pipeline: Callable[[nn.Module], Any]
    call: dict[str, Any] | None = None
    prompts: list[int] | None = None
    guidance: float = 4.0
    rows: int = 2 * PROMPTS
    """For each step."""
    scale: float = 1.0
    """Of the scheduler's timesteps, to those the transformer receives."""
    inputs: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states")
    shared: tuple[str, ...] = ()


def dit(transformer: nn.Module) -> Any:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())


def pixart(transformer: nn.Module) -> Any:
    return diffusers.PixArtSigmaPipeline(None, None, None, transformer, diffusers.DDIMScheduler())


def sd3(transformer: nn.Module) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, *[None] * 7)


def sd3_heun(transformer: nn.Module) -> Any:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, *[None] * 7)


def flux(transformer: nn.Module) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.FluxPipeline(scheduler, *[None] * 5, transformer)


def wan(transformer: nn.Module) -> Any:
    return diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0), transformer)


def wan22(transformer: nn.Module) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return diffusers.WanPipeline(None, None, None, scheduler, transformer, expand_timesteps=True)


SIZE = {"height": 64, "width": 64}
TEXT = {"prompt_embeds": noise(PROMPTS, TOKENS, 24), "negative_prompt_embeds": noise(PROMPTS, TOKENS, 24, seed=1)}
POOLED = {"pooled_prompt_embeds": noise(PROMPTS, 16)}
NEGATIVE_POOLED = {"negative_pooled_prompt_embeds": noise(PROMPTS, 16, seed=1)}
MASKS = {
    name: torch.arange(TOKENS).lt(words).long().repeat(PROMPTS, 1)
    for name, words in (("prompt_attention_mask", 5), ("negative_prompt_attention_mask", 4))
}
WAN = {
    "height": 64,
    "width": 64,
    "num_frames": 5,
    "prompt_embeds": noise(PROMPTS, TOKENS, 20),
    "negative_prompt_embeds": noise(PROMPTS, TOKENS, 20, seed=1),
}
FLUX = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
SD3 = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")

CASES = {
    "dit": Case(family="dit", pipeline=dit, prompts=[3, 1, 4], inputs=("hidden_states", "timestep", "class_labels")),
    "pixart": Case(
        family="pixart_sigma",
        pipeline=pixart,
        call={**SIZE, **TEXT, **MASKS, "negative_prompt": None, "use_resolution_binning": False},
        inputs=("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
    ),
    "sd3": Case(family="sd3", pipeline=sd3, call={**SIZE, **TEXT, **POOLED, **NEGATIVE_POOLED}, inputs=SD3),
    "sd3 unguided": Case(
        family="sd3",
        pipeline=sd3,
        call={**SIZE, "prompt_embeds": TEXT["prompt_embeds"], **POOLED},
        inputs=SD3,
        guidance=1.0,
        rows=PROMPTS,
    ),
    "sd3 heun": Case(  # evaluates twice at every timestep but the first
        family="sd3", pipeline=sd3_heun, call={**SIZE, **TEXT, **POOLED, **NEGATIVE_POOLED}, inputs=SD3
    ),
    "flux": Case(  # guidance is an input
        family="flux",
        pipeline=flux,
        call={**SIZE, "prompt_embeds": TEXT["prompt_embeds"], **POOLED},
        inputs=FLUX,
        shared=("img_ids", "txt_ids"),
        rows=PROMPTS,
        scale=1e-3,
    ),
    "flux two-pass": Case(
        family="flux",
        pipeline=flux,
        call={**SIZE, **TEXT, **POOLED, **NEGATIVE_POOLED, "true_cfg_scale": 3.0},
        inputs=FLUX,
        shared=("img_ids", "txt_ids"),
        scale=1e-3,
    ),
    "wan": Case(family="wan", pipeline=wan, call=WAN),
    "wan22": Case(family="wan22", pipeline=wan22, call=WAN),
}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipeline(case) -> Any:
    return quiet(case.pipeline(FAMILIES[case.family].model()))


def collect(pipeline: Any, case: Case, timesteps: int | list[float]) -> CalibrationSamples:
    return collect_from_pipeline(
        pipeline, case.prompts, timesteps=timesteps, steps=STEPS, guidance=case.guidance, call=case.call
    )


@pytest.fixture(scope="module")
def samples(case, pipeline) -> CalibrationSamples:
    """At the first, the third and the fifth step."""
    return collect(pipeline, case, 3)


def visited(pipeline: Any, case: Case) -> list[float]:
    """What the transformer receives, told by the scheduler as the pipeline has left it."""
    received = (pipeline.scheduler.timesteps * case.scale).tolist()
    return list(dict.fromkeys(received))


def times(samples: CalibrationSamples) -> list[float]:
    """One for each row; the steps of a token-wise time are those of the last frame."""
    return samples.inputs["timestep"].reshape(len(samples), -1)[:, -1].tolist()


def evaluations(name: str, steps: Iterable[int]) -> list[int]:
    return [2 if name == "sd3_heun" and step > 0 else 1 for step in steps]


def test_rows_are_those_of_the_chosen_steps(case, pipeline, samples):
    counts = [case.rows * n for n in evaluations(case.pipeline.__name__, (0, 2, 4))]
    assert tuple(samples.inputs) == case.inputs and tuple(samples.shared) == case.shared
    assert len(samples) == sum(counts)
    recorded = Counter(times(samples))
    assert list(recorded.values()) == counts
    assert list(recorded) == pytest.approx(visited(pipeline, case)[::2], rel=1e-6)


def test_steps_are_named_by_the_timesteps_that_the_transformer_receives(case, pipeline, samples):
    wanted = [float(f"{t:.5g}") for t in visited(pipeline, case)[1:4:2]]  # as somebody would write them
    named = collect(pipeline, case, wanted)
    assert len(named) == case.rows * sum(evaluations(case.pipeline.__name__, (1, 3)))
    assert sorted(set(times(named)), reverse=True) == pytest.approx(wanted, rel=1e-4)
    assert not set(times(named)) & set(times(samples))


@pytest.mark.parametrize("case", ["dit", "pixart", "sd3", "flux", "wan"], indirect=True)
def test_the_samples_run_the_exported_graph(case, pipeline, samples):
    batch = next(samples.shuffled(0).batches(3))
    exported = export_transformer(pipeline.transformer, samples.example(2))
    expected = pipeline.transformer(**samples.signature.bind(batch)).sample
    assert len(batch) == len(case.inputs + case.shared) and len(expected) == 3
    torch.testing.assert_close(exported(*batch), expected, rtol=1e-4, atol=1e-4)


def test_guidance_records_both_halves():
    """Wan calls its transformer twice, SD3 with a batch of twice the size; either way each embedding has its rows."""
    for name in ("wan", "sd3"):
        samples = collect(quiet(CASES[name].pipeline(FAMILIES[name].model())), CASES[name], 1)
        rows = samples.inputs["encoder_hidden_states"]
        for embedding in (*CASES[name].call["prompt_embeds"], *CASES[name].call["negative_prompt_embeds"]):
            assert sum(torch.equal(row, embedding) for row in rows) == 1, name


def test_samples_of_a_pipeline_come_back_from_disk(case, samples, tmp_path):
    samples.save(tmp_path / "samples.safetensors")
    loaded = CalibrationSamples.load(tmp_path / "samples.safetensors")
    assert loaded.signature == samples.signature and list(loaded.inputs) == list(samples.inputs)
    for one, other in zip(loaded.batches(4), samples.batches(4), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_timestep_of_the_scheduler_that_the_transformer_does_not_receive():
    """Flux divides by 1000: the message shows it."""
    flux = CASES["flux"]
    with pytest.raises(CalibrationError, match=r"never visits timestep 1000; the nearest it visits is 1$"):
        collect(quiet(flux.pipeline(FAMILIES["flux"].model())), flux, [1000.0])


# -- components that are called at some of the steps only ------------------------------------------------------------

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def wan_experts(ratio: float | None = 0.5) -> Any:
    """Wan 2.2 A14B: one transformer for much noise, one for little."""
    return quiet(
        diffusers.WanPipeline(
            None,
            None,
            vae=None,
            scheduler=diffusers.UniPCMultistepScheduler(**FLOW),
            transformer=FAMILIES["wan"].model(),
            transformer_2=FAMILIES["wan"].model(seed=1),
            boundary_ratio=ratio,
        )
    )


def count_calls(pipeline: Any, *components: str) -> list[str]:
    """The components that run, one entry for each call."""
    seen: list[str] = []
    for name in components:
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


@pytest.mark.parametrize(("component", "own"), [("transformer", slice(0, 4)), ("transformer_2", slice(4, 6))])
def test_each_of_two_experts_is_recorded_at_its_own_steps(component, own):
    pipeline = wan_experts()
    pipeline.scheduler.set_timesteps(6)
    available = pipeline.scheduler.timesteps.tolist()[own]
    for count in range(1, len(available) + 1):
        samples = collect_from_pipeline(pipeline, None, component=component, timesteps=count, steps=6, call=WAN)
        assert list(Counter(samples.inputs["timestep"].tolist())) == choose_timesteps(available, count)
    named = collect_from_pipeline(pipeline, None, component=component, timesteps=available[1:2], steps=6, call=WAN)
    assert set(named.inputs["timestep"].tolist()) == {available[1]} and len(named) == 2 * PROMPTS
    drawn = NormalTimesteps(count=4)
    embeds = {name: value for name, value in WAN.items() if "embeds" not in name}
    pipeline.encode_prompt = lambda prompt, **_: (WAN["prompt_embeds"][: len(prompt)],) * 2
    samples = collect_from_pipeline(pipeline, ["a", "b"], component=component, timesteps=drawn, steps=6, call=embeds)
    assert len(samples) == 2 * 4 and set(samples.inputs["timestep"].tolist()) <= set(available)


@pytest.mark.parametrize(
    ("options", "ratio", "message"),
    [
        ({"timesteps": 3}, 0.5, "3 calibration timesteps asked for, the pipeline calls its transformer_2 at 2 steps;"),
        ({"timesteps": [999]}, 0.5, "never visits timestep 999; the nearest it visits is"),
        (
            {"timesteps": 1},
            None,
            "WanPipeline never calls its transformer_2 in these 6 steps: its bound.* is None",
        ),
        (
            {"timesteps": 1},
            0.1,
            r"never calls its transformer_2 .* is 0\.1; record the other one, or take more",
        ),
        ({"timesteps": 1, "component": "transformer_3"}, 0.5, "has no module 'transformer_3' to record"),
    ],
)
def test_what_an_expert_does_not_do_is_refused_before_anything_runs(options, ratio, message):
    pipeline = wan_experts(ratio)
    seen = count_calls(pipeline, "transformer", "transformer_2")
    with pytest.raises(CalibrationError, match=message):
        collect_from_pipeline(pipeline, None, **{"component": "transformer_2", "steps": 6, "call": WAN, **options})
    assert seen == []


def sd3_img2img(transformer: nn.Module) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    return quiet(diffusers.StableDiffusion3Img2ImgPipeline(transformer, scheduler, vae, *[None] * 6))


IMG2IMG = {**SIZE, **TEXT, **POOLED, **NEGATIVE_POOLED, "image": noise(PROMPTS, 3, 64, 64).clamp(0, 1)}


def test_an_image_to_image_pipeline_is_recorded_over_the_steps_that_it_takes():
    pipeline = sd3_img2img(FAMILIES["sd3"].model())
    samples = collect_from_pipeline(pipeline, None, timesteps=2, steps=10, call={**IMG2IMG, "strength": 0.3})
    assert list(Counter(times(samples))) == pytest.approx(pipeline.scheduler.timesteps[[7, 9]].tolist())
    seen = count_calls(pipeline, "transformer")
    with pytest.raises(CalibrationError, match="calls its transformer at 3; give timesteps=3 and steps=3"):
        collect_from_pipeline(pipeline, None, timesteps=4, steps=10, call={**IMG2IMG, "strength": 0.3})
    with pytest.raises(CalibrationError, match=r"never visits timestep 1000; the nearest it visits is 46"):
        collect_from_pipeline(pipeline, None, timesteps=[1000.0], steps=10, call={**IMG2IMG, "strength": 0.3})
    assert len(seen) == 2  # each of them was told after one step


def test_a_schedule_in_the_call_is_what_timesteps_are_spread_over():
    case, pipeline = CASES["flux"], quiet(CASES["flux"].pipeline(FAMILIES["flux"].model()))
    call = {**case.call, "sigmas": [1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1]}
    samples = collect_from_pipeline(pipeline, None, timesteps=4, steps=5, call=call)  # more of them than steps
    assert list(Counter(times(samples))) == pytest.approx((pipeline.scheduler.timesteps[::2] / 1000).tolist())
    call = {**case.call, "sigmas": [1.0, 0.5]}
    with pytest.raises(CalibrationError, match="3 calibration timesteps asked for, the sampler has 2 steps"):
        collect_from_pipeline(pipeline, None, timesteps=3, call=call)


def test_steps_that_a_solver_adds_are_steps():
    """DPM2 evaluates between the steps, too: at 9 times in 5 steps, the last of which must not be left out."""
    case = CASES["dit"]
    pipeline = quiet(dit(FAMILIES["dit"].model()))
    pipeline.scheduler = diffusers.KDPM2DiscreteScheduler()
    samples = collect(pipeline, case, 3)
    evaluated = list(dict.fromkeys(pipeline.scheduler.timesteps.tolist()))
    assert len(evaluated) == 9 and list(Counter(times(samples))) == evaluated[::4]
    drawn = NormalTimesteps(count=9)
    with pytest.raises(CalibrationError, match=r"drawn from 5 steps, .* at 9; give steps=9 .*'num_inference_steps': 5"):
        collect_from_pipeline(pipeline, case.prompts, timesteps=drawn, steps=5)
    call = {"num_inference_steps": 5}
    samples = collect_from_pipeline(pipeline, case.prompts, timesteps=drawn, steps=9, call=call)
    assert len(samples) == 2 * 9 and set(times(samples)) <= set(evaluated)
    first = collect_from_pipeline(pipeline, case.prompts, timesteps=2, steps=3, call=call)
    assert list(Counter(times(first))) == evaluated[0:3:2]  # called at no more than 3, somebody says


@dataclass(eq=False)
class Loop:
    """The loop that pipelines of diffusers have: from some step on, with the time in some form."""

    scheduler: Any
    form: Callable[[Tensor], Tensor]
    start: int

    def __post_init__(self) -> None:
        self.transformer = Denoiser()

    def __call__(self, prompt: list[str], num_inference_steps: int, generator: torch.Generator) -> None:
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for t in self.received():
            self.transformer(x, timestep=t.expand(len(x)))

    def received(self) -> list[Tensor]:
        return [self.form(t) for t in self.scheduler.timesteps[self.start :]]


SCHEDULERS = [
    diffusers.CogVideoXDDIMScheduler,
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.LCMScheduler,
    diffusers.PNDMScheduler,
    diffusers.UniPCMultistepScheduler,
]
FORMS = {
    "as it is": lambda t: t,
    "of 1": lambda t: t / 1000,
    "from 0 to 1": lambda t: 1 - t / 1000,
    "counted backwards": lambda t: (1000 - t) / 1000,
    "in bfloat16": lambda t: t.bfloat16() / 1000,
    "of its own": lambda t: (t + 1).log(),
}


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_timesteps_are_spread_over_the_steps_that_a_pipeline_takes(scheduler, form, start):
    """Of ten, from the first or from the fifth; where the form says nothing, ``steps`` must be right."""
    pipeline = Loop(scheduler(), FORMS[form], start)
    pipeline.scheduler.set_timesteps(10)
    expected = list(dict.fromkeys(float(t) for t in pipeline.received()))
    steps = len(expected) if form == "of its own" else 10
    samples = collect_from_pipeline(
        pipeline,
        ["a"],
        timesteps=3,
        steps=steps,
        guidance=None,
        call={"num_inference_steps": 10} if steps != 10 else None,
    )
    assert list(dict.fromkeys(times(samples))) == choose_timesteps(expected, 3)
    named = [float(f"{t:.6g}") for t in expected[1:3]]
    call = {"num_inference_steps": 10}
    assert len(collect_from_pipeline(pipeline, ["a"], timesteps=named, guidance=None, call=call)) >= 2


# -- calls of another kind -------------------------------------------------------------------------------------------

SKIP_LAYERS = {**CASES["sd3"].call, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9}


def test_the_calls_of_skip_layer_guidance_are_left_out():
    case, pipeline = CASES["sd3"], quiet(sd3(FAMILIES["sd3"].model()))
    plain = collect(pipeline, case, 3)
    seen = count_calls(pipeline, "transformer")
    with pytest.raises(
        CalibrationError,
        match=r"'skip_layers' is missing in one call and \[0\] in another; .* leave the others out \(skip=,",
    ):
        collect_from_pipeline(pipeline, None, timesteps=3, steps=STEPS, call=SKIP_LAYERS)
    seen.clear()
    samples = collect_from_pipeline(
        pipeline, None, timesteps=3, steps=STEPS, call=SKIP_LAYERS, skip=lambda arguments: "skip_layers" in arguments
    )
    assert len(seen) == STEPS + 4  # the third calls, at all steps but the first and the last one, ran
    assert len(samples) == len(plain) and times(samples) == times(plain)
    assert list(samples.signature.arguments) == list(plain.signature.arguments)
    with pytest.raises(CalibrationError, match=r"skip left out all \d+ calls of the pipeline's transformer"):
        collect_from_pipeline(pipeline, None, timesteps=3, steps=STEPS, call=SKIP_LAYERS, skip=lambda _: True)


# -- a sampler of our own --------------------------------------------------------------------------------------------

Draw = Callable[["Stub", Tensor, Tensor], object]


class Denoiser(nn.Module):
    def forward(
        self,
        x: Tensor,
        timestep: Any = None,
        text: Tensor | None = None,
        ids: Tensor | None = None,
        sizes: Any = None,
        options: Any = None,
        return_dict: bool = True,
    ) -> Tensor:
        return x


@dataclass(eq=False)
class Stub:
    """A pipeline whose ``draw`` calls the transformer once for each evaluation."""

    draw: Draw
    times: list[float] = field(default_factory=lambda: [9.0, 7.0, 5.0, 3.0, 1.0])
    prompts: list[list[str]] = field(default_factory=list)
    given: list[dict[str, object]] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.transformer = Denoiser()
        self.prior = Denoiser()
        self.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: self.evaluated.append(float(torch.as_tensor(kwargs["timestep"]).max())),
            with_kwargs=True,
        )

    def __call__(self, prompt: list[str], generator: torch.Generator, scale: float = 1.0, **options: object) -> None:
        self.prompts.append(prompt)
        self.given.append({"scale": scale, **options})
        for t in self.times:
            self.draw(self, torch.randn(len(prompt), 2, generator=generator), torch.tensor(t))


def once(stub: Stub, x: Tensor, t: Tensor) -> None:
    stub.transformer(x, timestep=t.expand(len(x)), text=torch.zeros(len(x), 4, 3), return_dict=False)


def twice(stub: Stub, x: Tensor, t: Tensor) -> None:
    once(stub, x, t)
    once(stub, x + 1, t)


def heun(stub: Stub, x: Tensor, t: Tensor) -> None:
    """Evaluates at t, and again where the step arrives, which the next step does once more."""
    once(stub, x, t)
    if t > stub.times[-1]:
        once(stub, x, torch.tensor(stub.times[stub.times.index(float(t)) + 1]))


def record(draw: Draw, prompts: Any = ("a", "b", "c"), **options: Any) -> CalibrationSamples:
    pipeline = options.pop("pipeline", None) or Stub(draw)
    return collect_from_pipeline(pipeline, prompts, **{"timesteps": 2, "steps": 5, **options})


@pytest.mark.parametrize(
    ("draw", "timesteps", "evaluated"),
    [
        (once, 3, [9, 5, 1]),
        (twice, 3, [9, 9, 5, 5, 1, 1]),
        (heun, 3, [9, 5, 5, 1, 1]),
        (heun, [7, 3.0001], [7, 7, 3, 3]),
        (once, 1, [9]),
        (twice, [5], [5, 5]),
    ],
)
def test_a_step_is_what_happens_at_one_timestep(draw, timesteps, evaluated):
    samples = record(draw, timesteps=timesteps)
    assert samples.inputs["timestep"].tolist() == [t for t in evaluated for _ in range(3)]


def test_steps_after_the_last_chosen_are_left_out():
    pipeline, progress = Stub(twice), []
    record(twice, pipeline=pipeline, timesteps=[9.0, 5.0], batch_size=2, on_progress=lambda *at: progress.append(at))
    assert pipeline.evaluated == [9, 9, 7, 7, 5, 5] * 2  # both passes of the last, too
    assert pipeline.prompts == [["a", "b"], ["c"]]
    assert progress == [(1, 10), (2, 10), (5, 10), (6, 10), (7, 10), (10, 10)]  # a list may go on to the last step
    pipeline, progress = Stub(twice), []
    record(twice, pipeline=pipeline, timesteps=1, on_progress=lambda *at: progress.append(at))
    assert pipeline.evaluated == [9, 9] and progress == [(1, 1)]
    record(twice, pipeline=pipeline, timesteps=2)
    assert pipeline.evaluated[2:] == [9, 9, 7, 7, 5, 5, 3, 3, 1, 1]  # the last step is one of two


def test_a_run_that_is_given_up_is_cleaned_up_after():
    pipeline, freed = Stub(once), []
    pipeline.maybe_free_model_hooks = lambda: freed.append(len(pipeline.evaluated))
    record(once, pipeline=pipeline, timesteps=[9.0], batch_size=2)
    assert freed == [1, 2]
    record(once, pipeline=pipeline, timesteps=2)
    assert freed == [1, 2]  # a whole run does so itself


def test_flow_times_take_the_nearest_within_tolerance():
    pipeline = Stub(twice, times=[1.0, 0.50004, 0.50001, 0.3333333, 0.0])
    samples = record(twice, pipeline=pipeline, timesteps=[0.5, 0.33333], prompts=["a"])
    assert samples.inputs["timestep"].tolist() == pytest.approx([0.50001] * 2 + [0.3333333] * 2, rel=1e-6)
    assert 0.0 not in pipeline.evaluated
    assert record(twice, pipeline=pipeline, timesteps=[0.0]).inputs["timestep"].unique().tolist() == [0.0]


def test_a_list_that_is_not_visited_is_refused_after_one_run():
    pipeline = Stub(once, times=[1.0, 0.75, 0.5])
    with pytest.raises(CalibrationError, match=r"never visits timestep 0\.7; the nearest it visits is 0\.75$"):
        record(once, pipeline=pipeline, timesteps=[1.0, 0.7], batch_size=1)
    assert pipeline.prompts == [["a"]]
    assert len(pipeline.transformer._forward_pre_hooks) == 1  # the stub's own is left
    assert choose_timesteps([1.0, 0.75], [0.75002]) == [0.75]


def test_a_sampler_that_takes_fewer_steps():
    pipeline = Stub(once, times=[9.0, 7.0, 5.0])
    message = (
        r"^3 calibration timesteps are spread over 5 steps, but the pipeline calls its transformer at 3; give "
        r"steps=3 \(and, if the pipeline is to be asked for 5, call=\{'num_inference_steps': 5\}\)$"
    )
    with pytest.raises(CalibrationError, match=message):
        record(once, pipeline=pipeline, timesteps=3)
    with pytest.raises(CalibrationError, match="6 calibration timesteps asked for, the sampler has 5 steps"):
        record(once, timesteps=6)
    with pytest.raises(CalibrationError, match=r"^4 .* at 3; give timesteps=3 and steps=3 \(and"):
        record(once, pipeline=pipeline, timesteps=4)
    assert len(record(once, pipeline=pipeline, timesteps=3, steps=3)) == 9


def test_drawn_steps_hold_in_both_calls_of_guidance():
    normal = NormalTimesteps(count=7)
    samples = record(twice, timesteps=normal, seed=2, batch_size=2)
    times = Stub(twice).times
    drawn = Counter(times[p] for positions in normal.deal(3, 5, seed=2) for p in positions)
    assert Counter(samples.inputs["timestep"].tolist()) == {t: 2 * count for t, count in drawn.items()}


def test_draws_need_prompts_and_all_steps():
    with pytest.raises(ArgumentError, match="deals its draws out to prompts, but prompts is None"):
        record(once, prompts=None, timesteps=NormalTimesteps(), call={"prompt": ["a"]})
    with pytest.raises(ArgumentError, match="and num_images_per_prompt is 2; repeat the prompts instead"):
        record(once, timesteps=NormalTimesteps(), call={"num_images_per_prompt": 2})
    with pytest.raises(CalibrationError, match=r"^calibration timesteps are drawn from 5 .* at 3; give steps"):
        record(once, pipeline=Stub(once, times=[9.0, 7.0, 5.0]), timesteps=NormalTimesteps())


def test_a_timestep_that_comes_back_is_the_step_it_was():
    pipeline = Stub(once, times=[9.0, 7.0, 9.0, 7.0, 5.0, 3.0, 1.0])
    assert record(once, pipeline=pipeline, timesteps=5, prompts=["a"]).inputs["timestep"].tolist() == pipeline.times


def test_a_time_for_each_token_counts_as_the_latest():
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        stub.transformer(x, timestep=torch.stack([torch.tensor(0.0), t]).expand(len(x), 2))

    samples = record(draw, timesteps=3)
    assert samples.inputs["timestep"].tolist() == [[0.0, t] for t in (9.0, 5.0, 1.0) for _ in range(3)]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("timesteps", [1, 2])
def test_one_timestep_for_the_batch_becomes_one_for_each_row(shape, timesteps):
    samples = record(lambda stub, x, t: stub.transformer(x, timestep=t.reshape(shape)), timesteps=timesteps)
    assert samples.inputs["timestep"].tolist() == [t for t in (9.0, 1.0)[:timesteps] for _ in range(3)]
    assert samples.shared == {}


def test_a_value_for_the_batch_that_changes_becomes_rows_and_one_that_does_not_is_shared():
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        stub.transformer(x, timestep=t, ids=torch.arange(4), text=torch.full((1, 2), 3.0), sizes=[t / 10, t * 0])

    samples = record(draw)
    assert samples.inputs["sizes_0"].tolist() == pytest.approx([0.9] * 3 + [0.1] * 3)
    assert {name: tuple(x.shape) for name, x in samples.shared.items()} == {"text": (1, 2), "ids": (4,), "sizes_1": ()}
    x, timestep, text, ids, sizes_0, sizes_1 = next(samples.batches(2))
    assert [len(rows) for rows in (x, timestep, sizes_0)] == [2, 2, 2]
    with pytest.raises(CalibrationError, match="the shared input 'ids' has 4 rows, too; give an example of another"):
        samples.example(4)
    example = samples.example(2)
    assert list(example) == ["x", "timestep", "text", "ids", "sizes"] and isinstance(example["sizes"], list)
    assert torch.equal(example["ids"], ids) and torch.equal(text, samples.shared["text"]) and sizes_1 == 0


def test_what_is_neither_row_nor_equal_is_refused():
    with pytest.raises(CalibrationError, match=r"'ids' differs .* shapes \[\(2,\)\], batches of \[3\]; record calls"):
        record(lambda stub, x, t: stub.transformer(x, timestep=t, ids=torch.stack([t, t])))


def test_prompts_of_two_lengths():
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        for length in (4, 6):
            stub.transformer(x, timestep=t, text=torch.zeros(len(x), length, 8))

    short, long = record(draw).groups
    assert short.inputs["text"].shape == (6, 4, 8) and long.inputs["text"].shape == (6, 6, 8)
    with pytest.raises(CalibrationError, match=r"'text' is \(3, 8\) float32 .* \(3,\) .* one dtype and number of axes"):
        record(lambda stub, x, t: stub.transformer(x, timestep=t, text=torch.zeros(3, 8) if t > 8 else x[:, 0]))
    with pytest.raises(CalibrationError, match=r"'text' is \(3,\) float32 in one call and \(3,\) float64 in another"):
        record(lambda stub, x, t: stub.transformer(x, timestep=t, text=x[:, 0].to(torch.float32 if t > 8 else float)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.5, 2.5), "argument 'options' is 1.5 in one call and 2.5 in another; only tensors may differ"),
        ((1, True), "argument 'options' is 1 in one call and True in another"),
        (([1], (1,)), r"argument 'options' is \[1\] in one call and \(1,\) in another"),
        (({"a": None}, {}), r"argument 'options' is \{'a': None\} in one call and \{\} in another"),
        (("missing", None), "argument 'options' is missing in one call and None in another"),
    ],
)
def test_plain_values_must_agree(values, message):
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        for value in values:
            stub.transformer(x, timestep=t, **({} if value == "missing" else {"options": value}))

    with pytest.raises(CalibrationError, match=message):
        record(draw)


def test_what_a_graph_cannot_take_is_refused_and_empty_options_are_not():
    with pytest.raises(ArgumentError, match="'options' of Denoiser is a dtype; only tensors, numbers"):
        record(lambda stub, x, t: stub.transformer(x, timestep=t, options=torch.float32))
    samples = record(lambda stub, x, t: stub.transformer(x, text=None, timestep=t, options={}, return_dict=False))
    assert list(samples.signature.arguments) == ["x", "timestep", "text", "options"]
    assert samples.signature.arguments["text"] is None and samples.signature.arguments["options"] == {}


def test_steps_cannot_be_told_without_a_timestep():
    with pytest.raises(CalibrationError, match="Denoiser received x, ids, but no timestep, timesteps, t to tell steps"):
        record(lambda stub, x, t: stub.prior(x, ids=t), component="prior")


def test_samples_in_a_list_are_refused():
    with pytest.raises(CalibrationError, match="Denoiser received x, timestep, .* samples in lists have no batch axis"):
        record(lambda stub, x, t: stub.transformer(list(x), timestep=t))
    with pytest.raises(CalibrationError, match="Denoiser received 'x', a tensor without a batch axis, first; record"):
        record(lambda stub, x, t: stub.transformer(t, timestep=t))


def test_another_component_is_recorded():
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        (stub.prior if t > 4 else stub.transformer)(x, timestep=t)

    assert sorted(set(record(draw, component="prior", timesteps=2, steps=3).inputs["timestep"].tolist())) == [5, 9]
    assert record(draw, timesteps=2, steps=2, prompts=["a"]).inputs["timestep"].tolist() == [3, 1]
    with pytest.raises(CalibrationError, match=r"Stub has no module 'unet' .*: 'transformer', 'prior'$"):
        record(draw, component="unet")
    with pytest.raises(CalibrationError, match=r"Stub has no module 'times' to record"):
        record(draw, component="times")
    with pytest.raises(CalibrationError, match="the pipeline never called its prior; nothing was recorded"):
        record(once, component="prior")


def test_the_call_goes_first_and_unknown_options_are_not_passed():
    pipeline = Stub(once)
    generator = torch.Generator().manual_seed(7)
    record(once, pipeline=pipeline, call={"scale": 3.0, "generator": generator, "height": 8}, prompts=["a"])
    assert pipeline.given == [{"scale": 3.0, "height": 8}]  # no steps, guidance or output_type
    first = record(once, call={"generator": torch.Generator().manual_seed(7)}, prompts=["a"])
    again = record(once, seed=7, prompts=["a"])
    assert torch.equal(first.inputs["x"], again.inputs["x"])


class Options(Stub):
    def __call__(self, prompt=None, num_inference_steps=0, guidance_scale=0, output_type="pil", generator=None):
        self.given.append(
            {"steps": num_inference_steps, "guidance": guidance_scale, "output": output_type, "prompt": prompt}
        )
        for t in self.times:
            self.draw(self, torch.zeros(2, 2), torch.tensor(t))


def test_options_that_the_pipeline_takes():
    pipeline = Options(once)
    record(once, pipeline=pipeline, guidance=2.5)
    record(once, pipeline=pipeline, guidance=None, prompts=None, call={"num_inference_steps": 8, "output_type": "pt"})
    assert pipeline.given == [
        {"steps": 5, "guidance": 2.5, "output": "latent", "prompt": ["a", "b", "c"]},
        {"steps": 8, "guidance": 0, "output": "pt", "prompt": None},
    ]


class ImageOnly(Stub):
    def __call__(self, image: Tensor, strength: float = 1.0) -> None:
        self.draw(self, image, torch.tensor(1.0))


def test_prompts_that_the_pipeline_does_not_take():
    with pytest.raises(
        ArgumentError,
        match="ImageOnly takes neither class_labels nor a prompt; it takes image, strength: give prompts=None",
    ):
        record(once, pipeline=ImageOnly(once))
    samples = record(once, None, pipeline=ImageOnly(once), call={"image": torch.zeros(2, 2)}, timesteps=1, steps=1)
    assert len(samples) == 2
    with pytest.raises(ArgumentError, match="prompts is the string 'a cat'; give a list of them"):
        record(once, "a cat")
    with pytest.raises(ArgumentError, match="'prompt' is in call, and prompts are given, too"):
        record(once, call={"prompt": ["a"]})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_at_its_step(bad):
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        stub.transformer(x, timestep=t, text=torch.full((len(x), 2), 1.0 if t > 5 else bad))

    message = rf"transformer received {bad} in 'text' at timestep 5: the float pipeline goes wrong there; sample with"
    with pytest.raises(CalibrationError, match=message):
        record(draw, timesteps=5)


class Masked(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor, attention_mask: Tensor) -> Tensor:
        return x


def test_a_mask_may_hide_with_minus_infinity():
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        stub.transformer(x, timestep=t, attention_mask=torch.tensor([[0.0, value]]).expand(len(x), 2))

    for value in (-math.inf, math.nan):
        stub = Stub(draw)
        stub.transformer = Masked()
        if value == -math.inf:
            assert record(draw, pipeline=stub).inputs["attention_mask"][0].tolist() == [0, value]
        else:
            with pytest.raises(CalibrationError, match="transformer received nan in 'attention_mask'"):
                record(draw, pipeline=stub)


def test_a_mask_of_another_dtype_is_refused():
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        mask = torch.ones(len(x), 4, dtype=torch.bool)
        stub.transformer(x, timestep=t, text=mask if t > 5 else mask.float())

    with pytest.raises(CalibrationError, match=r"\(3, 4\) bool .* \(3, 4\) float32 in another; rows need one dtype"):
        record(draw)


def test_samples_of_inference_mode_can_be_learned_on():
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        with torch.inference_mode():
            stub.transformer(x * 1, timestep=t * 1, ids=torch.arange(5))

    with torch.inference_mode():
        outside = record(once)
    for samples in (record(draw), outside):
        assert not any(tensor.is_inference() for tensor in (*samples.inputs.values(), *samples.shared.values()))


def test_a_compiled_transformer_is_recorded_as_the_one_it_was():
    def draw(stub: Stub, x: Tensor, t: Tensor) -> None:
        stub.transformer(x, t, torch.zeros(len(x), 2))

    stubs = Stub(draw), Stub(draw)
    stubs[0].transformer, stubs[1].transformer = torch.compile(Denoiser(), backend="eager"), Denoiser()
    compiled, plain = (record(draw, pipeline=stub) for stub in stubs)
    assert compiled.signature == plain.signature and list(compiled.inputs) == ["x", "timestep", "text"]
    assert all(torch.equal(compiled.inputs[name], plain.inputs[name]) for name in plain.inputs)


class Anything(nn.Module):
    def forward(self, *args: Tensor, **options: Tensor) -> Tensor:
        return args[0]


def test_arguments_without_a_name_are_refused():
    stub = Stub(lambda stub, x, t: stub.transformer(x, t))
    stub.transformer = Anything()
    with pytest.raises(CalibrationError, match="forward of Anything names 0 arguments, .* called with 2 by position"):
        record(once, pipeline=stub)


def test_a_cache_is_refused_and_what_moves_or_casts_is_not():
    case, pipeline = CASES["flux"], quiet(CASES["flux"].pipeline(FAMILIES["flux"].model()))
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
    collect(pipeline, case, 1)
    diffusers.hooks.apply_first_block_cache(pipeline.transformer, diffusers.FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(CalibrationError, match=r"FluxPipeline's transformer has the hook 'fbc_leader_block_hook' of"):
        collect(pipeline, case, 1)


def test_prompts_beside_their_embeddings():
    pipeline = quiet(CASES["sd3"].pipeline(FAMILIES["sd3"].model()))
    with pytest.raises(ArgumentError, match="'prompt_embeds' is in call, and prompts are given, too"):
        collect_from_pipeline(pipeline, ["a"], timesteps=1, call=CASES["sd3"].call)


def test_options_that_a_pipeline_does_not_take_are_said(caplog):
    record(once)
    assert caplog.messages == [
        "Stub ignores steps (num_inference_steps), guidance (guidance_scale), which it does not take"
    ]
    caplog.clear()
    record(once, seed=3, call={"generator": torch.Generator()})
    assert "call has a generator of its own, so that seed=3 does not set the noise" in caplog.messages


def test_times_in_low_precision_that_become_one_are_one_step():
    """Of 200 steps of Flux, several have one time in bfloat16; all of them together are told after the first."""
    case = CASES["flux"]
    pipeline = quiet(case.pipeline(FAMILIES["flux"].model().bfloat16()))
    call = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in case.call.items()}
    seen = count_calls(pipeline, "transformer")
    with pytest.raises(CalibrationError, match=r"calls its transformer at 1\d\d; give timesteps=1"):
        collect_from_pipeline(pipeline, None, timesteps=200, steps=200, call=call)
    assert len(seen) == 1
    named = [float(torch.tensor(t / 1000, dtype=torch.bfloat16)) for t in pipeline.scheduler.timesteps[[3]]]
    samples = collect_from_pipeline(pipeline, None, timesteps=named, steps=200, call=call)
    assert set(times(samples)) == set(named)


# -- samples with a signature ----------------------------------------------------------------------------------------


def nested() -> CalibrationSamples:
    arguments = {
        "x": noise(4, 2),
        "text": None,
        "ids": torch.arange(6),
        "sizes": (noise(4), [(noise(3, seed=1), 2.5), True], (), math.inf),
        "options": {"a": {"b": "c"}, "d": torch.tensor(1)},
    }
    signature, tensors = flatten_call(Denoiser(), arguments)
    rows = {name: tensors.pop(name) for name in ("x", "sizes_0")}
    return CalibrationSamples(rows, tensors, signature)


def test_tuples_lists_and_shared_tensors_come_back_from_disk(tmp_path):
    samples, path = nested(), tmp_path / "samples.safetensors"
    samples.shuffled(1).save(path)
    loaded = CalibrationSamples.load(path)
    assert loaded.signature == samples.signature and repr(loaded.signature) == repr(samples.signature)
    assert sorted(loaded.shared) == sorted(samples.shared) == ["ids", "options_d", "sizes_1_0_0"]
    for one, other in zip(loaded.batches(3), samples.shuffled(1).batches(3), strict=True):
        assert len(one) == 5 and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))
    example = loaded.example(2)
    assert [type(part) for part in example["sizes"]] == [Tensor, list, tuple, float]
    assert type(example["sizes"][1][0]) is tuple and example["sizes"][1][1] is True
    assert example["options"]["a"] == {"b": "c"} and example["text"] is None


def test_without_a_signature_there_are_only_rows(tmp_path):
    samples = CalibrationSamples({"x": noise(4, 2), "t": torch.arange(4)}, {"ids": torch.arange(3)})
    samples.save(tmp_path / "plain.safetensors")
    for each in (samples, CalibrationSamples.load(tmp_path / "plain.safetensors")):
        assert each.signature is None and list(each.shared) == ["ids"]
        example = each.example(3)
        assert isinstance(example, tuple) and [tuple(x.shape) for x in example] == [(3, 2), (3,)]


def test_a_signature_of_other_tensors():
    signature, _ = flatten_call(Denoiser(), {"x": noise(2), "ids": noise(2)})
    with pytest.raises(
        CalibrationError, match=r"the signature takes \['x', 'ids'\], but there are tensors for \['x'\]; give one"
    ):
        CalibrationSamples({"x": noise(2)}, signature=signature)


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("{", r"are damaged \(Expecting"),
        ("[]", r"are damaged \(unknown structure \[\] in the signature\); record them again"),
        ('{"x": [1]}', r"unknown structure \[1\]"),
        ('{"x": {"tensor": 1}}', r"unknown structure \{\"tensor\": 1\}"),
        ('{"x": {"set": [1]}}', r"unknown structure \{\"set\": \[1\]\}"),
        ('{"x": {"list": [], "tuple": []}}', "unknown structure"),
        ('{"x": {"dict": []}}', "unknown structure"),
        ('{"x": {"tuple": {"0": 1}}}', "unknown structure"),
        ('{"y": {"tensor": "y"}}', r"the signature takes \['y'\], but there are tensors for \['x'\]"),
        ('{"x": ' + '{"list": [' * 5000 + "]}" * 5000 + "}", "recursion"),
    ],
)
def test_damaged_signatures(signature, message, tmp_path):
    path = tmp_path / "samples.safetensors"
    CalibrationSamples({"x": noise(2)}).save(path)
    metadata, _ = FORMAT.read(path)
    FORMAT.write(path, {"x": noise(2)}, {**metadata, "signature": signature})
    with pytest.raises(CalibrationError, match=message):
        CalibrationSamples.load(path)
    FORMAT.write(path, {"x": noise(2)}, {**metadata, "inputs": "x,z"})
    with pytest.raises(CalibrationError, match=r"samples\.safetensors are damaged \('z'\)"):
        CalibrationSamples.load(path)


def test_a_dict_that_json_would_change_is_not_saved(tmp_path):
    signature, tensors = flatten_call(Denoiser(), {"x": noise(2), "options": {3: 1}})
    with pytest.raises(CalibrationError, match="a dict with the key 3; only string keys can be saved"):
        CalibrationSamples(tensors, signature=signature).save(tmp_path / "samples.safetensors")
    assert json.dumps({3: 1}) == '{"3": 1}' and not list(tmp_path.iterdir())
