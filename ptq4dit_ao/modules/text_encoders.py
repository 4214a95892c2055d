"""Text encoders of transformers with int8 linears, by torchao: weights alone, or inputs as well.

Their inputs have outliers in a few tokens, so a static range of all tokens would lose the others. Weights need no
calibration, and inputs get a range for each token when the encoder runs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from ptq4dit_ao.choices import TextMethod
from ptq4dit_ao.errors import ArgumentError

CONFIGURATIONS: dict[TextMethod, Any] = {
    "int8_weight_only": Int8WeightOnlyConfig,
    "int8_dynamic": Int8DynamicActivationInt8WeightConfig,
}
"""torchao's configuration of each method."""


def quantized_text_encoder(name: str, model: nn.Module, method: TextMethod) -> nn.Module:
    """A copy of a model of transformers whose linears are quantized, which transformers can save and load.

    Layers that transformers leaves out are left: output embeddings, tied ones, and those kept in float32.

    Args:
        name: name of the component, for messages.
        model: the model. It is not changed.
        method: whether inputs are quantized, too.

    Raises:
        ArgumentError: it is quantized already.
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    if getattr(model, "hf_quantizer", None) is not None:
        raise ArgumentError(f"{name} is quantized already; load it in float, or leave it out of the recipes")
    quantized: Any = copy.deepcopy(model)
    config = CONFIGURATIONS[method](set_inductor_config=False)
    settings = TorchAoConfig(config)
    quantizer = TorchAoHfQuantizer(settings, pre_quantized=True)
    kept = quantizer.get_modules_to_not_convert(quantized, None, getattr(quantized, "_keep_in_fp32_modules", None))

    def is_taken(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and should_convert_module(path, kept)

    quantize_(quantized, config, filter_fn=is_taken)
    quantized.hf_quantizer = quantizer
    quantized.config.quantization_config, quantized.is_quantized = settings, True
    return quantized  # type: ignore[no-any-return]
