"""Integer matrix products as oneDNN itself reports them: also those of code that torch's profiler does not see into.

An AOTInductor package calls oneDNN past torch's dispatcher, so the profiler shows nothing of it. oneDNN, asked to be
verbose, prints a line for everything it runs, with the dtypes of what it multiplied::

    onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_vnni,undef,src:u8:a:... wei:s8:a:... dst:f32:...
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.backends import mkldnn

_PREFIX = b"onednn_verbose,"
_INTEGER_GEMM = re.compile(rb",exec,cpu,(matmul|inner_product),[^,]*,[^,]*,src:([us]8):\S* wei:(s8):")
_ALONE = threading.Lock()


def count_onednn_gemms(model: Callable[..., object], inputs: Sequence[Tensor]) -> dict[str, int]:
    """Integer GEMMs of one run of ``model``: primitive and dtypes -> how often.

    Counts the whole process: nothing else should multiply integers meanwhile.
    """
    with torch.no_grad():
        model(*inputs)
        with _reports() as lines:
            model(*inputs)
    found = filter(None, map(_INTEGER_GEMM.search, lines))
    return dict(Counter("onednn::{}({}, {})".format(*map(bytes.decode, match.groups())) for match in found))


@contextmanager
def _reports() -> Iterator[list[bytes]]:
    """The lines of oneDNN, once the block has ended. What others print meanwhile arrives after it."""
    lines: list[bytes] = []
    # oneDNN prints from C, so it is the file descriptor that has to be turned, not sys.stdout.
    with _ALONE, tempfile.TemporaryFile() as caught, open(os.dup(1), "wb") as stdout:
        os.dup2(caught.fileno(), 1)
        try:
            with mkldnn.verbose(mkldnn.VERBOSE_ON):
                yield lines
        finally:
            os.dup2(stdout.fileno(), 1)
            caught.seek(0)
            for line in caught:
                lines.append(line) if line.startswith(_PREFIX) else stdout.write(line)
