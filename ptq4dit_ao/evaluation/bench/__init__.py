"""Speed of a quantized model on its backends, beside the float model and other tools' results."""
