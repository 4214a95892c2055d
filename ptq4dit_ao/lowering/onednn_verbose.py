"""Integer matrix products as oneDNN reports them, including those that torch's profiler does not see.

An AOTInductor package calls oneDNN without torch's dispatcher, so the profiler does not show it. In verbose mode oneDNN
prints a line for every primitive that it runs, with the dtypes of its operands::

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
    """Integer matrix products in one run of ``model``: primitive and dtypes -> count.

    The whole process is counted, so nothing else should multiply integers at the same time.
    """
    with torch.no_grad():
        model(*inputs)
        with _reports() as lines:
            model(*inputs)
    found = filter(None, map(_INTEGER_GEMM.search, lines))
    return dict(Counter("onednn::{}({}, {})".format(*map(bytes.decode, match.groups())) for match in found))


@contextmanager
def _reports() -> Iterator[list[bytes]]:
    """Lines of oneDNN, complete when the block has ended. Other output to stdout is written after it."""
    lines: list[bytes] = []
    # oneDNN prints from C, so the file descriptor has to be redirected instead of sys.stdout.
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
