"""Record what a pipeline's transformer receives at chosen timesteps, classifier-free guidance included."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq4dit_ao.calibration.samples import CalibrationSamples, join_calls
from ptq4dit_ao.calibration.timesteps import NormalTimesteps, StepSelection, choose_timesteps
from ptq4dit_ao.errors import ArgumentError, CalibrationError, check_type
from ptq4dit_ao.graph.names import TIMESTEP_NAMES
from ptq4dit_ao.graph.signature import CallSignature, flatten_call


@torch.no_grad()
def collect_from_pipeline(
    pipeline: Any,
    prompts: Sequence[int] | Sequence[str] | None,
    *,
    timesteps: int | Sequence[float] | NormalTimesteps,
    steps: int = 50,
    guidance: float | None = 4.0,
    seed: int = 0,
    batch_size: int = 16,
    component: str = "transformer",
    call: Mapping[str, object] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> CalibrationSamples:
    """Generate one sample per prompt and keep the transformer's inputs at the chosen timesteps.

    With guidance each prompt gives two rows per timestep, conditional and unconditional, be it in one call of the
    transformer or in two. Memory is bounded by ``2 * len(prompts) * number of timesteps`` rows; a sample is given up
    after the last chosen timestep.

    Args:
        pipeline: anything that calls a module of its own while denoising, as diffusers' pipelines do.
        prompts: classes or texts, given to the pipeline as ``class_labels`` or ``prompt``; None if ``call`` says
            everything, which is one call of the pipeline.
        timesteps: how many, evenly spaced over ``steps``, or which, as the transformer receives them: for some flow
            models that is in [0, 1]; or :class:`NormalTimesteps`, where each sample has steps of its own.
        steps: sampling steps.
        guidance: classifier-free guidance scale; None leaves it to the pipeline.
        seed: of the initial noise and of drawn timesteps; equal seeds record equal samples.
        batch_size: prompts per pipeline call.
        component: the attribute of the pipeline that is recorded.
        call: more arguments for every call of the pipeline, passed as they are; they go before those above.
        on_step: called with (steps done, steps in all).

    Raises:
        CalibrationError: the timesteps do not occur, the component does not exist or was not called, or its calls do
            not fit together.
        ArgumentError: the pipeline does not take such prompts, or the component takes what cannot be captured; or
            timesteps are to be drawn for prompts that ``call`` holds.
    """
    _check_arguments(steps, batch_size, seed, guidance, call)
    module, call = _component(pipeline, component), dict(call or {})
    parameters = inspect.signature(pipeline.__call__).parameters
    selection = StepSelection(timesteps, steps)
    batches = _batches(pipeline, parameters, prompts, batch_size, call)
    draws = _draws(timesteps, prompts, steps, seed)
    length = _steps_per_run(pipeline, selection, whole_schedule="class_labels" in parameters and not call)
    options: dict[str, object] = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",  # or the VAE, which may be missing, would decode what nobody looks at
        **({} if guidance is None else {"guidance_scale": guidance}),
    }
    arguments = {name: value for name, value in options.items() if name in parameters} | call
    with _Recorder(module, component, selection) as recorder:
        for index, batch in enumerate(batches):

            def report(done: int, before: int = index * length) -> None:
                if on_step is not None:
                    on_step(before + min(done, length), len(batches) * length)

            recorder.start(report, draws and draws[index * batch_size :][:batch_size])
            try:
                pipeline(**arguments, **batch)
            except _Enough:
                getattr(pipeline, "maybe_free_model_hooks", lambda: None)()  # its last line, which offloads
            recorder.finish()
            report(length)
    return recorder.samples()


def _check_arguments(
    steps: int, batch_size: int, seed: int, guidance: float | None, call: Mapping[str, object] | None
) -> None:
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_type(name, value, Integral, "a whole number")
        if not least <= value < 2**63:
            raise ArgumentError(f"{name} is {value}; it must be at least {least}, and below 2^63")
    check_type("guidance", guidance, (Real, type(None)), "a number, or None for the pipeline's own")
    if guidance is not None and not math.isfinite(guidance):
        raise ArgumentError(f"guidance is {guidance}; it must be finite")
    check_type("call", call, (Mapping, type(None)), "a dict of arguments of the pipeline")


def _component(pipeline: object, name: str) -> nn.Module:
    check_type("component", name, str, "the name of the pipeline's module, such as 'transformer'")
    if not callable(pipeline):
        raise ArgumentError(f"pipeline is of type {type(pipeline).__name__}; give a pipeline of diffusers, or the like")
    module = getattr(pipeline, name, None)
    if isinstance(module, nn.Module):
        return module
    others = [repr(key) for key, value in vars(pipeline).items() if isinstance(value, nn.Module)]
    raise CalibrationError(
        f"{type(pipeline).__name__} has no module {name!r} to record; give component= one of its modules: "
        f"{', '.join(others) or 'it has none'}"
    )


def _batches(
    pipeline: object,
    parameters: Mapping[str, inspect.Parameter],
    prompts: Sequence[int] | Sequence[str] | None,
    size: int,
    call: Mapping[str, object],
) -> list[dict[str, object]]:
    """For each call of the pipeline, the argument that holds its prompts."""
    if prompts is None:
        return [{}]
    if isinstance(prompts, str):
        raise ArgumentError(f"prompts is the string {prompts!r}; give a list of them")
    if not len(prompts):
        raise ArgumentError("prompts is empty; give at least one, or None if call says everything")
    kinds = ("prompt", "class_labels") if prompts and isinstance(prompts[0], str) else ("class_labels", "prompt")
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    name = next((kind for kind in kinds if kind in parameters), kinds[0] if takes_all else None)
    if name is None:
        raise ArgumentError(
            f"{type(pipeline).__name__} takes neither class_labels nor a prompt; it takes {', '.join(parameters)}: "
            "give prompts=None and these in call"
        )
    if name == "class_labels" and prompts and isinstance(prompts[0], str):
        raise ArgumentError(
            f"prompts begin with the text {prompts[0]!r}, and {type(pipeline).__name__} is drawn by class; give "
            "numbers of classes"
        )
    if unknown := [] if takes_all else [key for key in call if key not in parameters]:
        raise ArgumentError(
            f"call has {unknown[0]!r}, which {type(pipeline).__name__} does not take; it takes {', '.join(parameters)}"
        )
    if name in call:
        raise ArgumentError(f"{name!r} is in call, and prompts are given, too; leave one of them out")
    return [{name: list(prompts[i : i + size])} for i in range(0, len(prompts), size)]


def _draws(
    timesteps: object, prompts: Sequence[int] | Sequence[str] | None, steps: int, seed: int
) -> list[list[int]] | None:
    """For each prompt the positions it is kept at, if each has its own."""
    if not isinstance(timesteps, NormalTimesteps):
        return None
    if prompts is None:
        raise ArgumentError(
            "NormalTimesteps deals its draws out to prompts, but prompts is None; give the prompts there, not in call"
        )
    return timesteps.deal(len(prompts), steps, seed)


def _steps_per_run(pipeline: Any, selection: StepSelection, *, whole_schedule: bool) -> int:
    """How many steps a run takes until it is given up, as far as that is known.

    A class-conditional pipeline passes on its scheduler's timesteps if they are integers, so that a wrong list is
    refused here. Others scale them, or set the scheduler with arguments of their own.
    """
    if selection.last is not None:
        return selection.last + 1
    scheduler = getattr(pipeline, "scheduler", None)
    if not whole_schedule or scheduler is None:
        return selection.steps
    scheduler.set_timesteps(selection.steps)
    if scheduler.timesteps.is_floating_point():
        return selection.steps
    available = list(dict.fromkeys(float(t) for t in scheduler.timesteps))
    return 1 + available.index(choose_timesteps(available, selection.wanted)[-1])


class _Enough(Exception):  # noqa: N818  (a signal, not an error)
    """Nothing more to record from this run."""


class _Call(NamedTuple):
    timestep: float
    signature: CallSignature
    tensors: dict[str, Tensor]


class _Recorder:
    """A forward pre-hook that keeps a module's arguments at the selected timesteps."""

    def __init__(self, module: nn.Module, component: str, selection: StepSelection) -> None:
        self.module, self.component, self.selection = module, component, selection
        self.names = list(inspect.signature(module.forward).parameters)
        self.calls: list[_Call] = []
        self.before = 0
        """Calls recorded in earlier runs."""
        self.report: Callable[[int], None] = lambda done: None
        self.draws: list[list[int]] | None = None

    def __enter__(self) -> _Recorder:
        self._hook = self.module.register_forward_pre_hook(self._record, with_kwargs=True, prepend=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    def start(self, report: Callable[[int], None], draws: list[list[int]] | None) -> None:
        """Begin a run; ``report`` is told the number of finished steps. Of ``draws`` each sample has its own."""
        self.report, self.before, self.draws = report, len(self.calls), draws
        self.selection.start()

    def finish(self) -> None:
        """End a run, and drop what only seemed to be at a wanted timestep."""
        if not self.selection.visited:
            raise self._nothing()
        chosen = self.selection.chosen()
        self.calls[self.before :] = [call for call in self.calls[self.before :] if call.timestep in chosen]

    def samples(self) -> CalibrationSamples:
        if not self.calls:
            raise self._nothing()
        return join_calls([(call.signature, call.tensors) for call in self.calls])

    def _nothing(self) -> CalibrationError:
        return CalibrationError(f"the pipeline never called its {self.component}; nothing was recorded")

    def _record(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        given.pop("return_dict", None)
        t = _timestep(module, given)
        if self.selection.is_over(t):
            raise _Enough
        finished = len(self.selection.visited)
        if finished and t not in self.selection.visited:
            self.report(finished)
        if self.selection.visit(t):
            signature, tensors = flatten_call(module, given)
            first = self.calls[0] if self.calls else None
            if first is not None:
                _check_structure(first.signature, signature)
                _check_shapes(first.tensors, tensors)
            else:
                _check_batch(module, tensors, given)
            if self.draws is not None:
                tensors = _drawn_rows(tensors, self.draws, self.selection.visited[t])
                if not tensors:
                    return
            known = {} if first is None else first.tensors
            self.calls.append(_Call(t, signature, {name: _keep(x, known.get(name)) for name, x in tensors.items()}))


def _check_batch(module: nn.Module, tensors: Mapping[str, Tensor], given: Mapping[str, object]) -> None:
    """Raises CalibrationError unless the first tensor is an argument of its own, and has an axis."""
    name = next(iter(tensors), None)
    if name is None or not isinstance(given.get(name), Tensor):
        raise CalibrationError(
            f"{type(module).__name__} received {', '.join(given)}, of which the first to hold tensors is no tensor "
            "itself; samples in lists have no batch axis, so they cannot be joined"
        )
    if tensors[name].ndim == 0:
        raise CalibrationError(f"{type(module).__name__} received {name!r}, a tensor without a batch axis, first")


def _drawn_rows(tensors: dict[str, Tensor], draws: list[list[int]], position: int) -> dict[str, Tensor]:
    """A call's rows of the samples that drew its position, as often as they did; nothing if there are none.

    Row r is of sample r modulo their number: so are both halves of guidance.
    """
    batch = len(next(iter(tensors.values())))
    rows = [row for row in range(batch) for _ in range(draws[row % len(draws)].count(position))]
    return {name: x[rows] if x.shape[:1] == (batch,) else x for name, x in tensors.items()} if rows else {}


def _keep(tensor: Tensor, known: Tensor | None) -> Tensor:
    """A copy on the CPU; position ids and the like, which are equal in all calls, are kept once."""
    tensor = tensor.detach().cpu()
    return known if known is not None and torch.equal(tensor, known) else tensor.clone()


def _timestep(module: nn.Module, given: Mapping[str, object]) -> float:
    """The time of a call. In a batch or per token (frames that are given have time 0), the latest one."""
    t = next((given[name] for name in TIMESTEP_NAMES if given.get(name) is not None), None)
    if t is None:
        raise CalibrationError(
            f"{type(module).__name__} received {', '.join(given)}, but no {', '.join(TIMESTEP_NAMES)} to tell steps by"
        )
    return float(t.max() if isinstance(t, Tensor) else t)  # type: ignore[arg-type]


def _check_structure(first: CallSignature, other: CallSignature) -> None:
    """Raises CalibrationError unless all but the tensors is equal, types included (1 is not True here)."""
    for name in {**first.arguments, **other.arguments}:
        values = [reprlib.repr(c.arguments[name]) if name in c.arguments else "missing" for c in (first, other)]
        if repr(first.arguments.get(name)) != repr(other.arguments.get(name)) or values.count("missing") == 1:
            raise CalibrationError(
                f"argument {name!r} is {values[0]} in one call and {values[1]} in another; only tensors may differ: "
                "record calls that agree in it"
            )


def _check_shapes(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raises CalibrationError where two calls differ in more than the first axis."""
    for name, tensor in first.items():
        kinds = [(x.dtype, x.ndim, x.shape[1:]) for x in (tensor, other[name])]
        if kinds[0] != kinds[1]:
            shapes = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (tensor, other[name])]
            raise CalibrationError(
                f"input {name!r} is {shapes[0]} in one call and {shapes[1]} in another; rows need one shape: pad all "
                "prompts to one length, and draw all samples at one size"
            )
