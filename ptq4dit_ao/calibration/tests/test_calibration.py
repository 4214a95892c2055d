"""Calibration samples are what the transformer received: at the chosen timesteps, for every label, once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor, nn

from ptq4dit_ao.calibration import (
    CalibrationSamples,
    NormalTimesteps,
    Sampling,
    SamplingPipeline,
    as_denoiser,
    check_timesteps,
    choose_timesteps,
    collect_from_pipeline,
    sample,
)
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_

STEPS = 10
LABELS = [3, 1, 4]

# -- which timesteps -------------------------------------------------------------------------------------------------

AVAILABLE = [900.0, 700.0, 500.0, 300.0, 100.0]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (1, [900.0]),
        (2, [900.0, 100.0]),
        (3, [900.0, 500.0, 100.0]),
        (5, AVAILABLE),
        ([100, 700], [700.0, 100.0]),
        ((300.0, 300.0), [300.0]),
        (AVAILABLE, AVAILABLE),
    ],
)
def test_timesteps_are_chosen_in_the_order_of_the_sampler(wanted, chosen):
    assert choose_timesteps(AVAILABLE, wanted) == chosen


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (0, "0 calibration timesteps asked for; ask for at least 1"),
        (6, "6 calibration timesteps asked for, the sampler has 5 steps"),
        (-1, "-1 calibration timesteps asked for"),
        ([900, 320], "never visits timestep 320; the nearest it visits is 300"),
        ([], "the list of calibration timesteps is empty; name at least one, or give a count"),
    ],
)
def test_timesteps_that_do_not_exist(wanted, message):
    with pytest.raises(CalibrationError, match=message):
        choose_timesteps(AVAILABLE, wanted)


@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.4), (0.5, 0.5), (0.1, 0.05)])
def test_drawn_timesteps_are_normal_and_those_outside_go_to_the_ends(mean, std):
    count, steps = 100_000, 10
    (positions,) = NormalTimesteps(mean=mean, std=std, count=count).deal(1, steps, seed=3)
    edges = stats.norm(mean, std).cdf([-torch.inf, *(t / steps for t in range(1, steps)), torch.inf])
    expected = edges[1:] - edges[:-1]
    found = [positions.count(steps - 1 - t) / count for t in range(steps)]  # t = 0 comes last
    assert found == pytest.approx(expected.tolist(), abs=0.006) and len(positions) == count


def test_draws_are_dealt_out_in_turn():
    one = NormalTimesteps(count=8)
    (whole,) = one.deal(1, 50, seed=0)
    assert one.deal(3, 50, seed=0) == [whole[0::3], whole[1::3], whole[2::3]]
    assert one.deal(1, 50, seed=1) != [whole]
    assert NormalTimesteps(mean=0.4, std=0.0, count=2).deal(2, 10, seed=0) == [[5], [5]]
    with pytest.raises(CalibrationError, match="8 timesteps are drawn for 9 samples; give count=9"):
        one.deal(9, 50, seed=0)


@pytest.mark.parametrize(
    "wrong", [{"mean": torch.nan}, {"mean": "0.4"}, {"std": -0.1}, {"std": torch.inf}, {"count": 0}, {"count": 2.5}]
)
def test_draws_that_make_no_sense(wrong):
    with pytest.raises(ArgumentError, match=r"NormalTimesteps\(.*\) needs a finite mean"):
        NormalTimesteps(**wrong)


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples() -> CalibrationSamples:
    rows = torch.arange(10)
    return CalibrationSamples({"x": torch.randn(10, 2, 3).transpose(1, 2), "t": rows * 100, "y": rows.to(torch.int32)})


def assert_equal(first: CalibrationSamples, second: CalibrationSamples) -> None:
    assert list(first.inputs) == list(second.inputs)
    for name, tensor in first.inputs.items():
        assert tensor.dtype == second.inputs[name].dtype and torch.equal(tensor, second.inputs[name]), name


def test_samples_come_back_from_disk(samples, tmp_path):
    samples.save(tmp_path / "samples.safetensors")
    assert_equal(CalibrationSamples.load(tmp_path / "samples.safetensors"), samples)


def test_batches_are_tuples_in_the_order_of_the_inputs(samples):
    batches = list(samples.batches(4))
    assert [len(x) for x, _, _ in batches] == [4, 4, 2] and len(samples) == 10
    for i, name in enumerate(samples.inputs):
        assert torch.equal(torch.cat([batch[i] for batch in batches]), samples.inputs[name])


def test_shuffling_moves_whole_rows(samples):
    shuffled = samples.shuffled(0)
    order = shuffled.inputs["y"].long()
    assert sorted(order.tolist()) == list(range(10)) and order.tolist() != list(range(10))
    for name, tensor in samples.inputs.items():
        assert torch.equal(shuffled.inputs[name], tensor[order])
    assert_equal(shuffled, samples.shuffled(0))
    assert not torch.equal(samples.shuffled(1).inputs["y"], shuffled.inputs["y"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"one common, non-zero number of rows, got \{\}"),
        ({"x": torch.zeros(3, 2), "t": torch.zeros(2)}, r"got \{'x': 3, 't': 2\}"),
        ({"x": torch.zeros(0, 2), "t": torch.zeros(0)}, r"got \{'x': 0, 't': 0\}"),
        ({"x": torch.zeros(2), "t": torch.tensor(1.0)}, r"number of rows, got \{'x': 2, 't': 0\}"),
    ],
)
def test_samples_need_rows(inputs, message):
    with pytest.raises(CalibrationError, match=message):
        CalibrationSamples(inputs)


def test_samples_are_tensors():
    with pytest.raises(ArgumentError, match="input 'x' is of type list; give a tensor whose first axis is the batch"):
        CalibrationSamples({"x": [1.0, 2.0]})


def test_a_name_is_either_of_rows_or_shared():
    with pytest.raises(CalibrationError, match="the calibration input 'x' is shared, and has rows, too"):
        CalibrationSamples({"x": torch.zeros(2)}, {"x": torch.zeros(3)})


@pytest.mark.parametrize("rows", [0, -1, 2.0, True])
def test_batches_of_no_rows(samples, rows):
    for take in (samples.batches, samples.spread, samples.example):
        with pytest.raises(ArgumentError, match=rf"is {rows}; give a whole number of rows, at least 1"):
            take(rows)


def test_tensors_of_one_memory_are_written_apart(tmp_path):
    table = torch.randn(4, 6)
    samples = CalibrationSamples({"x": table, "y": table}, {"ids": table[:3], "same": table})
    samples.save(tmp_path / "samples.safetensors")
    loaded = CalibrationSamples.load(tmp_path / "samples.safetensors")
    assert_equal(loaded, samples)
    assert torch.equal(loaded.shared["ids"], table[:3]) and torch.equal(loaded.shared["same"], table)


def test_a_name_that_a_file_cannot_hold(tmp_path):
    with pytest.raises(CalibrationError, match=r"cannot write .*: a name of \['x,y'\] has a comma; rename it"):
        CalibrationSamples({"x,y": torch.zeros(2)}).save(tmp_path / "samples.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_that_hold_no_samples(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CalibrationError, match=r"other\.safetensors is not a calibration samples file"):
        CalibrationSamples.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("x")
    for name in ("text", "missing"):
        with pytest.raises(CalibrationError, match=rf"cannot read calibration samples from .*{name}: "):
            CalibrationSamples.load(tmp_path / name)


# -- recording from pipelines ----------------------------------------------------------------------------------------


def tiny_transformer(**options: int) -> DiTTransformer2DModel:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
        "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero",
    }  # fmt: skip
    return randomize_(DiTTransformer2DModel(**{**config, **options}), seed=0).eval()


def diffusers_pipeline() -> DiTPipeline:
    """A real one, with learned variance and a VAE of one 8-channel block."""
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipeline = DiTPipeline(tiny_transformer(), vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bare_pipeline() -> SamplingPipeline:
    transformer = tiny_transformer(num_embeds_ada_norm=10, out_channels=4)
    return SamplingPipeline(transformer, Sampling.of(transformer))


@dataclass
class Calls:
    """What a transformer received."""

    inputs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        named = dict(zip(("hidden_states", "timestep", "class_labels"), args, strict=False)) | kwargs
        self.inputs.append(tuple(named[name].clone() for name in ("hidden_states", "timestep", "class_labels")))


@pytest.fixture(scope="module", params=[diffusers_pipeline, bare_pipeline])
def pipeline(request):
    return request.param()


@pytest.fixture
def calls(pipeline):
    seen = Calls()
    handle = pipeline.transformer.register_forward_pre_hook(seen, with_kwargs=True)
    yield seen
    handle.remove()


def null_label(pipeline) -> int:
    return pipeline.transformer.config.num_embeds_ada_norm


def test_every_label_is_recorded_at_the_chosen_timesteps(pipeline):
    samples = collect_from_pipeline(pipeline, LABELS, timesteps=4, steps=STEPS, guidance=4.0)
    pipeline.scheduler.set_timesteps(STEPS)
    visited = pipeline.scheduler.timesteps.tolist()
    rows = list(zip(samples.inputs["timestep"].tolist(), samples.inputs["class_labels"].tolist(), strict=True))
    expected = {(t, y): 1 for t in choose_timesteps(visited, 4) for y in LABELS}
    nulls = {(t, null_label(pipeline)): len(LABELS) for t in choose_timesteps(visited, 4)}
    assert list(samples.inputs) == ["hidden_states", "timestep", "class_labels"]
    assert len(samples) == 2 * len(LABELS) * 4
    assert Counter(rows) == expected | nulls


@pytest.mark.parametrize("batch_size", [2, 16])
def test_each_label_is_recorded_at_the_steps_it_drew(pipeline, batch_size):
    normal = NormalTimesteps(count=20)  # so that some steps are drawn twice for a label
    samples = collect_from_pipeline(
        pipeline, LABELS, timesteps=normal, steps=STEPS, guidance=4.0, seed=6, batch_size=batch_size
    )
    pipeline.scheduler.set_timesteps(STEPS)
    visited = pipeline.scheduler.timesteps.tolist()
    expected = Counter(
        (visited[position], label)
        for y, positions in zip(LABELS, normal.deal(len(LABELS), STEPS, seed=6), strict=True)
        for position in positions
        for label in (y, null_label(pipeline))
    )
    rows = zip(samples.inputs["timestep"].tolist(), samples.inputs["class_labels"].tolist(), strict=True)
    assert Counter(rows) == expected and max(expected.values()) > 1 and len(samples) == 2 * 20


def test_a_drawn_row_is_what_the_transformer_received(pipeline, calls):
    samples = collect_from_pipeline(pipeline, LABELS, timesteps=NormalTimesteps(count=3), steps=STEPS)
    received = {(int(t), int(y)): x for inputs in calls.inputs for x, t, y in zip(*inputs, strict=True) if y < 5}
    for x, t, y in zip(*samples.inputs.values(), strict=True):
        if y < 5:
            assert torch.equal(x, received.pop((int(t), int(y))))


def test_without_guidance_there_are_no_unconditional_rows():
    samples = collect_from_pipeline(diffusers_pipeline(), LABELS, timesteps=2, steps=STEPS, guidance=1.0)
    assert sorted(samples.inputs["class_labels"].tolist()) == sorted(LABELS * 2)


def test_what_is_recorded_is_what_the_transformer_received(pipeline, calls):
    wanted = [901, 401]
    samples = collect_from_pipeline(pipeline, LABELS, timesteps=_visited(pipeline, wanted), steps=STEPS, batch_size=2)
    kept = [inputs for inputs in calls.inputs if inputs[1][0].item() in _visited(pipeline, wanted)]
    assert len(kept) == 2 * 2  # two batches
    for name, tensors in zip(samples.inputs, zip(*kept, strict=True), strict=True):
        assert torch.equal(samples.inputs[name], torch.cat(tensors)), name


def _visited(pipeline, near: list[int]) -> list[float]:
    pipeline.scheduler.set_timesteps(STEPS)
    available = pipeline.scheduler.timesteps.tolist()
    return [float(min(available, key=lambda a: abs(a - t))) for t in near]


def test_images_are_given_up_after_the_last_chosen_timestep(pipeline, calls):
    progress = []
    collect_from_pipeline(
        pipeline, LABELS, timesteps=_visited(pipeline, [701, 901]), steps=STEPS, batch_size=2,
        on_progress=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    steps = 3  # near 901, 801 and 701
    assert [int(t[0]) // 100 for _, t, _ in calls.inputs] == [9, 8, 7] * 2
    assert [len(x) for x, _, _ in calls.inputs] == [4] * steps + [2] * steps
    assert progress == [(i + 1, 2 * steps) for i in range(2 * steps)]


def test_equal_seeds_record_equal_samples(pipeline):
    first, again, other = (
        collect_from_pipeline(pipeline, LABELS, timesteps=3, steps=STEPS, seed=seed) for seed in (5, 5, 6)
    )
    assert_equal(first, again)
    assert not torch.equal(first.inputs["hidden_states"], other.inputs["hidden_states"])


def test_batches_do_not_change_what_is_asked(pipeline):
    whole, split = (
        collect_from_pipeline(pipeline, LABELS, timesteps=2, steps=STEPS, batch_size=size) for size in (16, 1)
    )
    for name in ("timestep", "class_labels"):
        assert sorted(whole.inputs[name].tolist()) == sorted(split.inputs[name].tolist())


def test_recording_leaves_no_hook_and_no_gradient(pipeline):
    samples = collect_from_pipeline(pipeline, LABELS, timesteps=1, steps=STEPS)
    assert not pipeline.transformer._forward_hooks and not pipeline.transformer._forward_pre_hooks
    assert not any(tensor.requires_grad for tensor in samples.inputs.values())


def test_recorded_samples_run_the_exported_graph():
    pipeline = diffusers_pipeline()
    samples = collect_from_pipeline(pipeline, LABELS, timesteps=2, steps=STEPS).shuffled(0)
    inputs = next(samples.batches(5))
    exported = export_transformer(pipeline.transformer.requires_grad_(False), inputs)
    torch.testing.assert_close(exported(*inputs), as_denoiser(pipeline.transformer)(*inputs))


class Broken(SamplingPipeline):
    def __init__(self, what: str) -> None:
        transformer = tiny_transformer(num_embeds_ada_norm=10, out_channels=4)
        super().__init__(transformer, Sampling.of(transformer))
        self.what = what

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        if self.what == "fails":
            raise RuntimeError("out of memory")
        return torch.zeros(1)


def test_hooks_go_even_if_the_pipeline_fails():
    pipeline = Broken("fails")
    with pytest.raises(RuntimeError, match="out of memory"):
        collect_from_pipeline(pipeline, LABELS, timesteps=1, steps=STEPS)
    assert not pipeline.transformer._forward_hooks and not pipeline.transformer._forward_pre_hooks


def test_a_pipeline_that_does_not_call_its_transformer():
    with pytest.raises(CalibrationError, match="never called its transformer; nothing was recorded: give component="):
        collect_from_pipeline(Broken("idle"), LABELS, timesteps=1, steps=STEPS)


def test_unknown_timesteps_are_refused_before_anything_runs(pipeline, calls):
    with pytest.raises(CalibrationError, match="never visits timestep 5;"):
        collect_from_pipeline(pipeline, LABELS, timesteps=[5], steps=STEPS)
    with pytest.raises(CalibrationError, match="11 calibration timesteps asked for, the sampler has 10 steps"):
        collect_from_pipeline(pipeline, LABELS, timesteps=11, steps=STEPS)
    assert calls.inputs == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty; give at least one"),
        ({"prompts": [3, "cat"]}, r"prompts holds texts and classes, \[3, 'cat'\]; give one kind"),
        ({"prompts": [3, 11]}, "prompts holds class 11, and the model knows 0 to 10; give one of these"),
        ({"prompts": [-1]}, "prompts holds class -1, and the model knows 0 to 10"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 2.5}, r"steps is 2.5 \(float\); give a whole number"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"guidance": float("nan")}, "guidance is nan; it must be finite"),
        ({"timesteps": True}, "calibration timesteps is True; give how many, a list of them, or NormalTimesteps"),
        ({"timesteps": "all"}, "calibration timesteps is 'all'; give how many"),
        ({"timesteps": [900, float("inf")]}, "calibration timesteps holds inf; give finite numbers"),
    ],
)
def test_arguments_that_no_run_can_take(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        collect_from_pipeline(bare_pipeline(), **{"prompts": LABELS, "timesteps": 2, "steps": STEPS, **arguments})


def test_timesteps_are_checked_without_a_run(pipeline, calls):
    check_timesteps(pipeline, 10, STEPS)
    check_timesteps(pipeline, _visited(pipeline, [701, 901]), STEPS, what="evaluation")
    check_timesteps(pipeline, NormalTimesteps(count=3), STEPS)
    check_timesteps(pipeline, [*np.asarray(_visited(pipeline, [701, 901]), dtype=np.int64)], STEPS)
    message = (
        r"20 evaluation timesteps asked for, the sampler has 10 steps; ask for fewer \(evaluation\.timesteps\), or for "
        r"more steps \(calibration\.steps\)"
    )
    with pytest.raises(CalibrationError, match=message):
        check_timesteps(pipeline, 20, STEPS, what="evaluation")
    with pytest.raises(CalibrationError, match="never visits timestep 5; the nearest"):
        check_timesteps(pipeline, [5], STEPS)
    with pytest.raises(CalibrationError, match=r"DDIMScheduler cannot take 1001 steps: .*; give other steps"):
        check_timesteps(pipeline, 3, 1001)
    assert calls.inputs == []


# -- sampling --------------------------------------------------------------------------------------------------------

PIXELS = Sampling(channels=1, size=4, null_label=7, clip=False)


def test_sampling_knows_what_a_transformer_needs():
    sampling = Sampling.of(tiny_transformer(num_embeds_ada_norm=10))
    assert (sampling.channels, sampling.size, sampling.null_label, sampling.clip) == (4, 4, 10, False)
    assert Sampling.from_dict(sampling.to_dict()) == sampling


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
def test_guidance_leads_from_the_unconditional_to_the_conditional_noise(guidance):
    """With noise predictions that depend on the label only, every step is the scheduler's own."""

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.shape == (4, 1, 4, 4) and torch.equal(x[:2], x[2:]) and y.tolist() == [1, 2, 7, 7] and len(t) == 4
        eps = torch.where(y == 7, 0.25, y / 8).view(-1, 1, 1, 1).expand(x.shape)
        return torch.cat([eps, torch.full_like(eps, torch.nan)], dim=1)  # a learned variance, which does not matter

    labels = torch.tensor([1, 2])
    seen = []
    images = sample(
        denoiser, PIXELS, labels, steps=5, guidance=guidance, generator=torch.Generator().manual_seed(3),
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="linear")
    scheduler.set_timesteps(5)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    eps = (0.25 + guidance * (labels / 8 - 0.25)).view(-1, 1, 1, 1).expand(x.shape)
    for t in scheduler.timesteps:
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(images, x)
    assert seen == [(i, 5) for i in range(1, 6)]


def test_another_scheduler_draws_its_noise_from_the_generator():
    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(
            lambda x, t, y: x, PIXELS, torch.tensor([1, 2]), steps=3, generator=generator, scheduler=DDPMScheduler()
        )

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_clipped_samples_stay_in_range():
    def far(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(x, 50.0)

    labels = torch.tensor([0])
    clipped = sample(far, Sampling(channels=1, size=4, null_label=7, clip=True), labels, steps=3)
    assert clipped.abs().max() <= 1
    assert sample(far, PIXELS, labels, steps=3).abs().max() > 1


def test_a_bare_transformer_is_called_like_a_pipeline():
    bare = bare_pipeline()
    images = [
        bare(class_labels=[1, 2], guidance_scale=2.0, generator=torch.Generator().manual_seed(0), num_inference_steps=2)
        for _ in range(2)
    ]
    assert images[0].shape == (2, 4, 4, 4) and torch.equal(*images)
