"""Lines of other libraries that tell a user of the command line nothing about a model: each named by source and text.

What is not named here is shown, for it may concern the model. ``-v`` shows everything.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import warnings
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Logged:
    """Lines of a logger that begin like this; those of other loggers, and other lines, pass."""

    logger: str
    text: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is to be shown, as :mod:`logging` asks."""
        return re.match(self.text, record.getMessage()) is None


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Warnings of a category that begin like this, and that are said of the code of a module."""

    category: type[Warning]
    text: str = ""
    module: str = ""


LOGGED = (
    # Libraries of CUDA kernels in torchao's wheel, on machines without a GPU or with another version of torch.
    Logged(logger="torchao", text=r"Failed to load .*_C\S*\.so: "),
    Logged(logger="torchao.kernel.intmm", text="Warning: Detected no triton"),
    # diffusers looks for tensors of another version of torchao; it says so on every machine that has this one.
    Logged(logger="diffusers.quantizers.torchao.torchao_quantizer", text="Unable to import `torchao` Tensor objects"),
    # Said of a model of which no module is to be kept in float32, when "bench" casts it.
    Logged(logger="diffusers.models.modeling_utils", text=r"There are modules in \w+ that should .* float32: \[\]"),
    # torchao registers an enum of its own in a way that torch has given up.
    Logged(logger="torch.utils._pytree", text=r"<enum '\w+'> is an Enum subclass and is now natively supported"),
    # transformers looks for classes of images by torchvision, while a pipeline's text encoders are imported.
    Logged(logger="transformers.utils.import_utils", text=r"`\w+` requires torchvision"),
    # torch.onnx asks for the operators of torchvision, which no Diffusion Transformer has.
    Logged(logger="torch.onnx._internal.exporter._registration", text="torchvision is not installed. Skipping "),
)

_LIBRARIES = r"(torch|torchao|copyreg|nncf|openvino|onnxscript|onnxruntime)(\.|$)"
"""Not diffusers and transformers, whose deprecations are said of a checkpoint's configuration, too."""

WARNED = (
    Warned(category=DeprecationWarning, module=_LIBRARIES),
    Warned(category=FutureWarning, module=_LIBRARIES),
    # Of functions that this library calls, or torch itself; a user's code that calls them is another module.
    Warned(category=UserWarning, text=r".*\bdeprecated\b", module=r"(ptq4dit_ao|torch|torchao)\."),
    Warned(
        category=UserWarning, text=r"\w+ does not implement _stable_hash_for_caching", module=r"torch\._functorch\."
    ),
    Warned(category=UserWarning, text="To copy construct from a tensor", module=r"torch\._inductor\."),
)

ENVIRONMENT = {
    # The start and the stop of the profiler that counts integer kernels; above the level of all its messages, of which
    # no other is shown by default.
    "KINETO_LOG_LEVEL": "6",
}
"""Environment variables that C++ reads when torch is loaded; a value that the user has set stays."""


def silence() -> None:
    """Keep these lines off the console; to be called before torch is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for line in LOGGED:
        logging.getLogger(line.logger).addFilter(line)
    for one in WARNED:
        warnings.filterwarnings("ignore", category=one.category, message=one.text, module=one.module)


def silence_loading_bars() -> None:
    """Keep the bars of diffusers and transformers, of every model they load or save, off the console; imports them."""
    for name in ("diffusers.utils.logging", "transformers.utils.logging"):
        try:
            logs = importlib.import_module(name)
        except ImportError:  # whoever needs it says so
            continue
        logs.disable_progress_bar()
