"""Recording of the inputs of a pipeline's transformer at chosen timesteps, with classifier-free guidance."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.calibration.alike import check_kind, check_structure
from ptq4dit_ao.calibration.joining import RecordedCall, join_calls
from ptq4dit_ao.calibration.samples import CalibrationSamples
from ptq4dit_ao.calibration.schedule import FirstCalls, check_timesteps, known_times, rounding_of, steps_asked
from ptq4dit_ao.calibration.timesteps import RELATIVE_TOLERANCE, NormalTimesteps, StepSelection, choose_timesteps
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.errors import ArgumentError, CalibrationError, check_type
from ptq4dit_ao.graph.names import TIMESTEP_NAMES

_log = logging.getLogger(__name__)


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
    sizes: Sequence[Mapping[str, object]] | None = None,
    skip: Callable[[Mapping[str, Any]], bool] | None = None,
    on_progress: OnProgress = ignore,
) -> CalibrationSamples:
    """Generate one sample per prompt and record the transformer's inputs at the chosen timesteps.

    With guidance each prompt gives two rows per timestep, conditional and unconditional, in one call of the transformer
    or in two. Memory is bounded by ``2 * len(prompts) * number of timesteps`` rows. Sampling stops after the last
    chosen timestep.

    Calls of the transformer may differ in the sizes of their tensors, because the samples have several ``sizes`` or
    because texts of two calls have different lengths. Their rows are kept apart by size.

    Args:
        pipeline: any object that calls a module of its own while denoising, as diffusers' pipelines do.
        prompts: class numbers or texts, passed to the pipeline as ``class_labels`` or ``prompt``. None makes a single
            call of the pipeline with the arguments in ``call``, for each of the ``sizes``.
        timesteps: the number of timesteps, evenly spaced over the steps at which the component is called; a list of
            timesteps, as the transformer receives them (in [0, 1] for some flow models); or :class:`NormalTimesteps`,
            which gives each sample steps of its own.
        steps: sampling steps. A component may be called at fewer steps, as both transformers of Wan 2.2 and those of
            image-to-image pipelines are. That is detected if it receives its scheduler's times.
        guidance: classifier-free guidance scale; None keeps the pipeline's own.
        seed: seed of the initial noise and of drawn timesteps. Equal seeds record equal samples.
        batch_size: prompts per pipeline call.
        component: the attribute of the pipeline that is recorded.
        call: more arguments for every call of the pipeline, passed unchanged. They take precedence over those above.
        sizes: sizes of the samples, as arguments of the pipeline, such as ``[{"height": 512, "width": 512}, {"height":
            768, "width": 512}]`` or ``[{"num_frames": 17}, {"num_frames": 49}]``. Each prompt has one size: the prompts
            take them in turn, so that the number of rows is that without ``sizes``. A prompt is sampled at all sizes if
            it is given as many times. By default, all samples have the pipeline's own size, or that in ``call``.
        skip: a function of the arguments of a call of the component, by name, that returns whether not to record the
            call. The call runs nevertheless. A graph computes one kind of call, and this leaves out those of another
            kind, such as the one of skip-layer guidance: ``lambda arguments: "skip_layers" in arguments``.
        on_progress: called with (steps done, total steps).

    Raises:
        CalibrationError: the timesteps do not occur, the component does not exist or was not called, its calls do not
            fit together, or it received values that are not finite.
        ArgumentError: an argument is invalid, the pipeline does not take such prompts, the component takes inputs that
            cannot be captured, timesteps are to be drawn for prompts that ``call`` holds, or there are more sizes than
            prompts.
    """
    found = collect_components(
        pipeline,
        prompts,
        {component: timesteps},
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        call=call,
        sizes=sizes,
        skip=skip,
        on_progress=on_progress,
    )
    return found[component]


@torch.no_grad()
def collect_components(
    pipeline: Any,
    prompts: Sequence[int] | Sequence[str] | None,
    components: Mapping[str, int | Sequence[float] | NormalTimesteps],
    *,
    steps: int = 50,
    guidance: float | None = 4.0,
    seed: int = 0,
    batch_size: int = 16,
    call: Mapping[str, object] | None = None,
    sizes: Sequence[Mapping[str, object]] | None = None,
    skip: Callable[[Mapping[str, Any]], bool] | None = None,
    on_progress: OnProgress = ignore,
) -> dict[str, CalibrationSamples]:
    """Record several components in the same samples, such as both transformers of Wan 2.2.

    ``components`` has the ``timesteps`` of each, out of the steps at which it is called, by its name. The other
    arguments are those of :func:`collect_from_pipeline`.

    Raises:
        ArgumentError: there is no component; or see :func:`collect_from_pipeline`.
        CalibrationError: see :func:`collect_from_pipeline`.
    """
    _check_arguments(steps, batch_size, seed, guidance, call)
    check_type("components", components, Mapping, "a dict of timesteps by component, such as {'transformer': 10}")
    if not components:
        raise ArgumentError("components is empty; give at least one, with its timesteps")
    modules, call = {name: _component(pipeline, name) for name in components}, dict(call or {})
    sizes = _checked_sizes(sizes, call)
    sized = {**call, **sizes[0]}  # the schedule of every size, as far as it is known before a run
    for name, timesteps in components.items():
        check_timesteps(pipeline, timesteps, steps, component=name, call=sized)
    parameters = inspect.signature(pipeline.__call__).parameters
    runs = _runs(pipeline, parameters, prompts, batch_size, call, sizes)
    recorders: list[_Recorder] = []
    length = 0
    for (name, timesteps), module in zip(components.items(), modules.values(), strict=True):
        known = known_times(pipeline, name, steps, sized)
        asked = steps_asked(steps, call) if known is None else len(known)
        selection = StepSelection(timesteps, asked, name, exact="num_inference_steps" in call)
        draws = _draws(timesteps, prompts, selection.steps, seed, call)
        recorders.append(_Recorder(module, name, selection, FirstCalls(pipeline, name), skip, draws, recorders))
        length += _steps_per_run(selection, known)
    options: dict[str, object] = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",  # otherwise the VAE, which may be missing, would decode images that are not used
        **({} if guidance is None else {"guidance_scale": guidance}),
    }
    arguments = {name: value for name, value in options.items() if name in parameters} | call
    _log_left_out(pipeline, [name for name in options if name not in arguments])
    if seed and "generator" in call:
        _log.warning("call has a generator of its own, so that seed=%d does not set the noise", seed)
    with contextlib.ExitStack() as hooks:
        for recorder in recorders:
            hooks.enter_context(recorder)
        for index, run in enumerate(runs):

            def report(before: int = index * length) -> None:
                done = sum(len(recorder.selection.visited) for recorder in recorders)
                on_progress(before + min(done, length), len(runs) * length)

            for recorder in recorders:
                recorder.start(run, report)
            try:
                pipeline(**arguments, **run.arguments)
            except _Enough:
                getattr(pipeline, "maybe_free_model_hooks", lambda: None)()  # as a call that ends would do
            for recorder in recorders:
                recorder.finish()
            on_progress((index + 1) * length, len(runs) * length)
    return {recorder.component: recorder.samples() for recorder in recorders}


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
    if not isinstance(module, nn.Module):
        others = [repr(key) for key, value in vars(pipeline).items() if isinstance(value, nn.Module)]
        raise CalibrationError(
            f"{type(pipeline).__name__} has no module {name!r} to record; give component= one of its modules: "
            f"{', '.join(others) or 'it has none'}"
        )
    hook = next(_hooks_that_change_results(module), None)
    if hook is not None:
        raise CalibrationError(
            f"{type(pipeline).__name__}'s {name} has the hook {hook!r} of diffusers, a cache or the like: it would "
            f"receive what no quantized model will; remove it before recording ({name}.disable_cache())"
        )
    return module


_HARMLESS_HOOKS = (
    "cp_", "group_offloading", "layer_execution_tracker", "layerwise_casting", "lazy_", "peft_autocast_disable",
)  # fmt: skip
"""Prefixes of the names of diffusers' hooks that only move or cast parameters."""


def _hooks_that_change_results(module: nn.Module) -> Iterator[str]:
    """Names of diffusers' hooks, in any part of a module, that change its results."""
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        yield from (name for name in getattr(registry, "hooks", {}) if not name.startswith(_HARMLESS_HOOKS))


def _log_left_out(pipeline: object, names: Sequence[str]) -> None:
    """Warn of options that a pipeline does not take."""
    meant = {"num_inference_steps": "steps", "generator": "seed", "guidance_scale": "guidance"}
    left = [f"{meant[name]} ({name})" for name in names if name in meant]
    if left:
        _log.warning("%s ignores %s, which it does not take", type(pipeline).__name__, ", ".join(left))


def _checked_sizes(sizes: Sequence[Mapping[str, object]] | None, call: Mapping[str, object]) -> list[dict[str, object]]:
    """The sizes; a single one without arguments where none are given."""
    if sizes is None:
        return [{}]
    check_type("sizes", sizes, Sequence, "a list of dicts of arguments of the pipeline")
    for size in sizes:
        check_type("a size", size, Mapping, "a dict of arguments of the pipeline, such as {'height': 512}")
        if (twice := next((name for name in size if name in call), None)) is not None:
            raise ArgumentError(f"{twice!r} is in call and in sizes; leave it out of one of them")
    if not sizes:
        raise ArgumentError("sizes is empty; give at least one, or None for the pipeline's own size")
    return list(map(dict, sizes))


class _Run(NamedTuple):
    """A call of the pipeline."""

    arguments: dict[str, object]
    """Arguments of this call, beside those of every call."""
    prompts: Sequence[int]
    """Indices of its prompts."""
    size: int
    """Index of its size."""


def _runs(
    pipeline: object,
    parameters: Mapping[str, inspect.Parameter],
    prompts: Sequence[int] | Sequence[str] | None,
    batch_size: int,
    call: Mapping[str, object],
    sizes: Sequence[dict[str, object]],
) -> list[_Run]:
    """The calls of the pipeline, size by size. The prompts take the sizes in turn."""
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if unknown := [] if takes_all else [key for size in sizes for key in size if key not in parameters]:
        raise ArgumentError(
            f"sizes has {unknown[0]!r}, which {type(pipeline).__name__} does not take; it takes {', '.join(parameters)}"
        )
    if prompts is None:
        return [_Run(size, (), index) for index, size in enumerate(sizes)]
    name = _prompt_argument(pipeline, parameters, prompts, call, takes_all=takes_all)
    for where, given in (("call", call), *(("sizes", size) for size in sizes)):
        twice = next((other for other in (name, f"{name}_embeds") if given.get(other) is not None), None)
        if twice is not None:
            raise ArgumentError(f"{twice!r} is in {where}, and prompts are given, too; leave one of them out")
    if len(prompts) < len(sizes):
        raise ArgumentError(
            f"there are {len(sizes)} sizes and {len(prompts)} prompts, and each prompt has one size; give at least as "
            "many prompts"
        )
    runs = []
    for index, size in enumerate(sizes):
        own = range(index, len(prompts), len(sizes))
        for some in (own[i : i + batch_size] for i in range(0, len(own), batch_size)):
            runs.append(_Run({**size, name: [prompts[i] for i in some]}, some, index))
    return runs


def _prompt_argument(
    pipeline: object,
    parameters: Mapping[str, inspect.Parameter],
    prompts: Sequence[int] | Sequence[str],
    call: Mapping[str, object],
    *,
    takes_all: bool,
) -> str:
    """Name of the pipeline's argument for the prompts."""
    if isinstance(prompts, str):
        raise ArgumentError(f"prompts is the string {prompts!r}; give a list of them")
    if not len(prompts):
        raise ArgumentError("prompts is empty; give at least one, or None if call says everything")
    texts = [isinstance(prompt, str) for prompt in prompts]
    if len(set(texts)) > 1:
        raise ArgumentError(f"prompts holds texts and classes, {reprlib.repr(list(prompts))}; give one kind")
    kinds = ("prompt", "class_labels") if texts[0] else ("class_labels", "prompt")
    name = next((kind for kind in kinds if kind in parameters), kinds[0] if takes_all else None)
    if name is None:
        raise ArgumentError(
            f"{type(pipeline).__name__} takes neither class_labels nor a prompt; it takes {', '.join(parameters)}: "
            "give prompts=None and these in call"
        )
    if name == "class_labels" and texts[0]:
        raise ArgumentError(
            f"prompts begin with the text {prompts[0]!r}, and {type(pipeline).__name__} is class-conditional; "
            "give class numbers"
        )
    if unknown := [] if takes_all else [key for key in call if key not in parameters]:
        raise ArgumentError(
            f"call has {unknown[0]!r}, which {type(pipeline).__name__} does not take; it takes {', '.join(parameters)}"
        )
    if name == "class_labels":
        _check_classes(pipeline, prompts)
    return name


def _check_classes(pipeline: object, labels: Sequence[Any]) -> None:
    """Check that the transformer knows the classes, where its number of classes is known.

    Raises:
        ArgumentError: it does not know one of them.
    """
    config: Any = getattr(getattr(pipeline, "transformer", None), "config", None)
    last: int | None = getattr(config, "num_embeds_ada_norm", None)  # the null class counts as a class, too
    odd = [] if last is None else [label for label in labels if not 0 <= label <= last]
    if odd:
        raise ArgumentError(f"prompts holds class {odd[0]}, and the model knows 0 to {last}; give one of these")


def _draws(
    timesteps: object, prompts: Sequence[int] | Sequence[str] | None, steps: int, seed: int, call: Mapping[str, object]
) -> list[list[int]] | None:
    """Positions at which each prompt is recorded, if each prompt has its own; else None."""
    if not isinstance(timesteps, NormalTimesteps):
        return None
    if prompts is None:
        raise ArgumentError(
            "NormalTimesteps deals its draws out to prompts, but prompts is None; give the prompts there, not in call"
        )
    several = next(
        (name for name in ("num_images_per_prompt", "num_videos_per_prompt") if call.get(name, 1) != 1), None
    )
    if several is not None:
        raise ArgumentError(
            f"NormalTimesteps deals its draws out to prompts, and {several} is {call[several]!r}; repeat the "
            "prompts instead"
        )
    return timesteps.deal(len(prompts), steps, seed)


def _steps_per_run(selection: StepSelection, known: Sequence[float] | None) -> int:
    """Number of steps after which a run is stopped, as far as it is known."""
    if selection.last is not None:
        return selection.last + 1
    if known is None:
        return selection.steps
    return 1 + known.index(choose_timesteps(known, selection.wanted)[-1])


class _Enough(Exception):  # noqa: N818  (a signal, not an error)
    """A signal that this run has nothing more to record."""


class _Recorder:
    """A forward pre-hook that records a module's arguments at the selected timesteps."""

    def __init__(
        self,
        module: nn.Module,
        component: str,
        selection: StepSelection,
        first_calls: FirstCalls,
        skip: Callable[[Mapping[str, Any]], bool] | None,
        draws: list[list[int]] | None,
        peers: Sequence[_Recorder],
    ) -> None:
        self.module, self.component, self.selection, self.first_calls = module, component, selection, first_calls
        self.all_draws, self.peers = draws, peers
        self.over = False
        """Whether nothing more is to be recorded in this run."""
        # The forward of torch.compile's module takes any arguments, so the original's signature is needed.
        self.original = getattr(module, "_orig_mod", module)
        self.skip = skip or (lambda arguments: False)
        self.skipped = 0
        self.calls: list[RecordedCall] = []
        self.size = 0
        self.known: dict[tuple[int, str, torch.Size], Tensor] = {}
        """The first tensor of each size, name and shape, to store those once that are equal in all calls."""
        self.before = 0
        """Number of calls recorded in earlier runs."""
        self.report: Callable[[], None] = lambda: None
        self.draws: list[list[int]] | None = None
        self.expected = False
        """Whether the steps of this run are known."""

    def __enter__(self) -> _Recorder:
        self._hook = self.module.register_forward_pre_hook(self._record, with_kwargs=True, prepend=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    def start(self, run: _Run, report: Callable[[], None]) -> None:
        """Begin a run. ``report`` is called when a step is finished."""
        self.size, self.report, self.before, self.over = run.size, report, len(self.calls), False
        self.draws = self.all_draws and [self.all_draws[prompt] for prompt in run.prompts]
        self.selection.start()
        self.first_calls.start()
        self.expected = False

    def finish(self) -> None:
        """End a run, and drop calls that only seemed to be at a wanted timestep."""
        if not self.selection.visited:
            raise self._nothing()
        chosen = self.selection.chosen()
        self.calls[self.before :] = [call for call in self.calls[self.before :] if call.timestep in chosen]

    def samples(self) -> CalibrationSamples:
        """The calls of all runs as calibration samples."""
        if not self.calls:
            raise self._nothing()
        with torch.inference_mode(False):
            return join_calls(self.calls)

    def _nothing(self) -> CalibrationError:
        if self.skipped:
            return CalibrationError(
                f"skip left out all {self.skipped} calls of the pipeline's {self.component}; nothing was recorded: "
                "let it return False for those to record"
            )
        return CalibrationError(
            f"the pipeline never called its {self.component}; nothing was recorded: give component= the module that it "
            "calls at every step"
        )

    def _record(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = _named(self.original, args, kwargs)
        given.pop("return_dict", None)
        if self.skip(given):
            self.skipped += 1
            return
        time = _timestep(self.original, given)
        t = float(time.max() if isinstance(time, Tensor) else time)
        if not self.expected and len(self.selection.visited) < 2 and t not in self.selection.visited:
            self._look_ahead(time)
        if self.selection.is_over(t):
            self.over = True
            if all(peer.over for peer in self.peers):
                raise _Enough
            return
        if self.selection.visited and t not in self.selection.visited:
            self.report()
        if self.selection.visit(t):
            self._keep_call(given, t)

    def _look_ahead(self, time: Tensor | float) -> None:
        """At the first steps of a run, predict its timesteps and check that the wanted ones are among them."""
        times = self.first_calls.all_times(list(self.selection.visited), time)
        listed = self.selection.positions is None
        if times is not None and not (listed and rounding_of(time) > RELATIVE_TOLERANCE):
            self.selection.expect(times)
            self.expected = True

    def _keep_call(self, given: dict[str, Any], t: float) -> None:
        signature, tensors = flatten_call(self.original, given)
        first = self.calls[0] if self.calls else None
        if first is not None:
            check_structure(first.signature, signature)
            for name, x in tensors.items():
                check_kind(name, first.tensors[name], x)
        else:
            _check_batch(self.original, tensors, given)
        _check_finite(self.component, tensors, t)
        if self.draws is not None:
            tensors = _drawn_rows(tensors, signature.numbers, self.draws, self.selection.visited[t])
            if not tensors:
                return
        kept = {name: self._kept(name, x) for name, x in tensors.items()}
        self.calls.append(RecordedCall(t, self.size, signature, kept))

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        """A copy on the CPU. Tensors that are equal in all calls of a size, such as position ids, are stored once."""
        tensor, place = tensor.detach().cpu(), (self.size, name, tensor.shape)
        known = self.known.get(place)
        if known is not None and torch.equal(tensor, known):
            return known
        with torch.inference_mode(False):  # learning needs ordinary tensors, even if the pipeline ran in inference mode
            copy = tensor.clone()
        self.known.setdefault(place, copy)
        return copy


def _named(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Any]:
    """Arguments of a call by name.

    Raises:
        CalibrationError: ``forward`` has no name for one.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds]
    if len(args) > len(names):
        raise CalibrationError(
            f"forward of {type(module).__name__} names {len(names)} arguments, and was called with {len(args)} by "
            "position; samples need names: call it with keywords, or give its forward a signature"
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_batch(module: nn.Module, tensors: Mapping[str, Tensor], given: Mapping[str, object]) -> None:
    """Check that the first tensor is an argument of its own and has a batch axis.

    Raises:
        CalibrationError: it is not.
    """
    name = next(iter(tensors), None)
    if name is None or not isinstance(given.get(name), Tensor):
        raise CalibrationError(
            f"{type(module).__name__} received {', '.join(given)}, of which the first to hold tensors is no tensor "
            "itself; samples in lists have no batch axis, so they cannot be joined"
        )
    if tensors[name].ndim == 0:
        raise CalibrationError(
            f"{type(module).__name__} received {name!r}, a tensor without a batch axis, first; record a module whose "
            "first tensor is a batch"
        )


def _drawn_rows(
    tensors: dict[str, Tensor], numbers: Collection[str], draws: list[list[int]], position: int
) -> dict[str, Tensor]:
    """Rows of a call whose samples drew its position, repeated as often as they drew it; empty if none did.

    Row r belongs to sample r modulo the number of samples, so both halves of a guidance batch are included.
    """
    batch = len(next(iter(tensors.values())))
    rows = [row for row in range(batch) for _ in range(draws[row % len(draws)].count(position))]
    batched = {name for name, x in tensors.items() if x.shape[:1] == (batch,) and name not in numbers}
    return {name: x[rows] if name in batched else x for name, x in tensors.items()} if rows else {}


def _check_finite(component: str, tensors: Mapping[str, Tensor], t: float) -> None:
    """Check that the inputs are finite. A mask may hold minus infinity.

    Raises:
        CalibrationError: an input holds NaN or infinity.
    """
    for name, x in tensors.items():
        bad = x.isnan() | (x == torch.inf) if "mask" in name else ~x.isfinite()
        if bad.any():
            raise CalibrationError(
                f"{component} received {x[bad][0].item()} in {name!r} at timestep {t:g}: the float pipeline goes wrong "
                "there; sample with it once, and record in a dtype in which it works (float32)"
            )


def _timestep(module: nn.Module, given: Mapping[str, Any]) -> Tensor | float:
    """The timestep of a call. With one per row or token, the largest counts, because given frames have time 0."""
    t = next((given[name] for name in TIMESTEP_NAMES if given.get(name) is not None), None)
    if t is None:
        raise CalibrationError(
            f"{type(module).__name__} received {', '.join(given)}, but no {', '.join(TIMESTEP_NAMES)} to tell steps "
            "by; give apply_recipe tuples of its inputs instead"
        )
    return t  # type: ignore[no-any-return]
