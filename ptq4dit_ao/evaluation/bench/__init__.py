"""Benchmark of a quantized model's speed on its backends, beside the float model and other tools' quantized models."""
