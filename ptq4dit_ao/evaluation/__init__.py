"""Comparisons of quantized models with their float model, with each other, and with other tools' quantized models."""
