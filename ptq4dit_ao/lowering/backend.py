"""Backend records, and the registry of all backends."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from operator import itemgetter
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao._optional import missing_package
from ptq4dit_ao.errors import ArgumentError, LoweringError, check_type
from ptq4dit_ao.lowering.match import IntegerLinear, QuantizedLinear
from ptq4dit_ao.lowering.proof import count_kernels

logger = logging.getLogger(__name__)

Runnable = Callable[..., Tensor | tuple[Tensor, ...]]
"""A built model: a function of the graph's inputs."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Quantized linears that a backend carries: activations per tensor, weights per output channel."""

    activation_dtypes: tuple[torch.dtype, ...] = (torch.uint8,)
    """Dtypes of stored activations. Fewer bits than 8 use a part of the dtype's range."""
    weight_dtypes: tuple[torch.dtype, ...] = (torch.int8,)
    """Dtypes of stored weights."""
    asymmetric_weights: bool = False
    """Whether weights may have a zero point other than 0."""
    model_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Dtypes of the float model around the linears."""
    float_dtypes: tuple[torch.dtype, ...] = ()
    """Values that ``float_dtype`` of ``lower`` may have."""

    def refuse(self, linear: QuantizedLinear) -> str | None:
        """The reason why these capabilities do not cover a linear; None if they do."""
        if linear.dtype not in self.model_dtypes:
            return (
                f"needs a {_names(self.model_dtypes)} model, got {_names([linear.dtype])}: call .float() on the model "
                f"before quantizing, or lower for {' or '.join(map(repr, backends_for(linear.dtype)))}"
            )
        if linear.x_dtype not in self.activation_dtypes or linear.weight.dtype not in self.weight_dtypes:
            return (
                f"needs {_names(self.activation_dtypes)} activations and {_names(self.weight_dtypes)} weights, "
                f"got {_names([linear.x_dtype])} and {_names([linear.weight.dtype])}"
            )
        if not self.asymmetric_weights and linear.weight_zero_point.any():
            return "needs symmetric weights"
        return None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of ``lower`` to build a graph."""

    graph: GraphModule
    """A private copy of the graph. Its tensors are shared: replace or delete them, but do not write into them."""
    linears: Sequence[QuantizedLinear]
    """The linears of ``graph`` that the backend carries."""
    example_inputs: tuple[Tensor, ...]
    float_dtype: torch.dtype | None = None
    """Dtype of the float part; None for the model's own dtype."""
    attention: int = 0
    """Number of attention's quantized matrix products in ``graph``."""
    weight_only: Sequence[IntegerLinear] = ()
    """Linears of float inputs and integer weights. A backend must not keep float copies of these weights."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A record of how one backend runs a converted graph, and of how to prove that it does.

    A new backend is one file that makes such a record and passes it to :func:`register`; see
    docs/maintainers/add_a_backend.md. Another package can do so, too: an entry point in the group
    ``ptq4dit_ao.backends`` names the module.
    """

    name: str
    """Name that ``lower`` takes."""
    summary: str
    """One line for ``ptq4dit-ao backends``."""
    integer: bool
    """Whether it runs integer kernels. Otherwise it simulates them in float."""
    build: Callable[[Request], Runnable]
    """Builds a function of the graph's inputs."""
    rank: int | None = None
    """Position in the order in which ``auto`` tries backends, lowest first. ``auto`` never chooses one with None."""
    rare: bool = False
    """Whether most machines cannot run it. ``auto`` passes over it without a warning then."""
    kernels: tuple[str, ...] = ()
    """Names, in torch's profiler, of the kernels that multiply integers by integers."""
    packages: tuple[str, ...] = ()
    """Optional packages that it imports."""
    extra: str | None = None
    """Extra of this package that installs them."""
    carries: Capabilities | None = None
    """Linears that it carries; None for all."""
    refuse: Callable[[QuantizedLinear], str | None] = lambda linear: None
    """Returns the reason why it cannot carry a linear that ``carries`` allows, or None."""
    lacks: Callable[[], str | None] = lambda: None
    """Returns the reason why this machine's hardware or torch cannot run it, and the remedy, or None."""
    count: Callable[[Runnable, Sequence[Tensor]], dict[str, int]] | None = None
    """Counts the integer matrix products of linears in one call: kernel -> count.

    If None, torch's profiler counts :attr:`kernels`.
    """
    count_attention: Callable[[Runnable, Sequence[Tensor]], dict[str, int]] = lambda run, inputs: {}
    """Counts the matrix products of attention that one call computes with integers: kernel -> count."""
    write: Callable[[Request, Path], Runnable] | None = None
    """Writes the file that another program runs, into a folder of its own, and loads it.

    None if there is no such file.
    """
    suffix: str = ""
    """Suffix of that file."""
    prunes: bool = False
    """Whether it leaves out nodes that no output depends on, even those cut off by a slice only."""
    compiles: bool = False
    """Whether building takes minutes. The parity check then does not build parts of the graph to locate an error."""

    def unavailable(self) -> str | None:
        """The reason why this machine cannot run it, and the remedy; None if it can."""
        return missing_package(self.packages, self.extra) or self.lacks()

    def integer_gemms(self, run: Runnable, inputs: Sequence[Tensor]) -> dict[str, int]:
        """Integer matrix products of linears in one call of the built model: kernel -> count."""
        return count_kernels(run, inputs, self.kernels) if self.count is None else self.count(run, inputs)

    def why_not(self, linear: QuantizedLinear) -> str | None:
        """The reason why it cannot carry a linear; None if it can."""
        declared = None if self.carries is None else self.carries.refuse(linear)
        return declared or self.refuse(linear)


PLUGINS = "ptq4dit_ao.backends"
"""Group of entry points by which other packages add backends."""


class Backends(MutableMapping[str, Backend]):
    """Backends by name. Those of other packages are loaded at the first look, and not by an import of this package."""

    def __init__(self) -> None:
        self._registered: dict[str, Backend] = {}
        self._complete = False
        self._lock = RLock()  # a plugin may look, too, while it is loaded

    def add(self, backend: Backend) -> None:
        """Add a backend without loading those of other packages.

        Raises:
            ArgumentError: the name is taken.
        """
        if backend.name in self._registered or backend.name == "auto":
            raise ArgumentError(f"there is a backend {backend.name!r} already; register this one under another name")
        self._registered[backend.name] = backend

    def _all(self) -> dict[str, Backend]:
        with self._lock:
            if not self._complete:
                self._complete = True
                load_plugins()
        return self._registered

    def __getitem__(self, name: str) -> Backend:
        return self._all()[name]

    def __setitem__(self, name: str, backend: Backend) -> None:
        self._all()[name] = backend

    def __delitem__(self, name: str) -> None:
        del self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


BACKENDS = Backends()
"""Every backend, by name."""


def register(backend: Backend) -> None:
    """Add a backend under its name.

    Raises:
        ArgumentError: the name is taken.
    """
    check_type("backend", backend, Backend, "a Backend")
    BACKENDS.add(backend)


def load_plugins() -> None:
    """Import the modules that other packages name as entry points of the group ``ptq4dit_ao.backends``.

    A plugin that fails is named in a warning, and the others are loaded.
    """
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:  # errors of another package must not stop the other plugins
            logger.warning("backend plugin %s (%s) cannot be loaded: %s", plugin.name, plugin.value, error)


def available_backends() -> dict[str, str]:
    """Name -> summary of the backends that this machine can run."""
    return {name: backend.summary for name, backend in BACKENDS.items() if backend.unavailable() is None}


def missing_backends() -> dict[str, str]:
    """Name -> reason why this machine cannot run it, for the other backends."""
    reasons = {name: backend.unavailable() for name, backend in BACKENDS.items()}
    return {name: why for name, why in reasons.items() if why is not None}


def backends_for(dtype: torch.dtype) -> list[str]:
    """Names of the backends that run models of a dtype."""
    return [name for name, b in BACKENDS.items() if b.carries is None or dtype in b.carries.model_dtypes]


def choose_backend(name: str, linears: Sequence[QuantizedLinear] = ()) -> Backend:
    """The backend of a name or, for ``auto``, the first by rank that runs here and carries the linears.

    ``auto`` logs a warning for each backend that it passes over, except for rare ones.

    Raises:
        LoweringError: the name is unknown, or this machine cannot run the backend.
    """
    check_type("backend", name, str, "its name, or 'auto'")
    if name == "auto":
        return _best(linears)
    chosen = BACKENDS.get(name)
    if chosen is None:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LoweringError(f"backend {name!r} is unknown; there are {', '.join(map(repr, BACKENDS))}{hint}")
    why = chosen.unavailable()
    if why is not None:
        raise LoweringError(f"backend {name!r} cannot run here: {why}; 'auto' takes the best that can")
    return chosen


def _best(linears: Sequence[QuantizedLinear]) -> Backend:
    passed: list[str] = []
    ranked = [(backend.rank, backend) for backend in BACKENDS.values() if backend.rank is not None]
    for _, backend in sorted(ranked, key=itemgetter(0)):
        why = backend.unavailable() or next(filter(None, map(backend.why_not, linears)), None)
        if why is None:
            for line in passed:
                logger.warning("%s; taking %r", line, backend.name)
            return backend
        if not backend.rare:
            passed.append(f"backend {backend.name!r} cannot run here: {why}")
    raise AssertionError("the reference backend runs anything anywhere")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
