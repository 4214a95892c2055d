"""Compare many: quantized models with their float model, with each other, and with what other tools make of it."""
