"""Module form: the float module with integer weights in its linears, and how it is saved and loaded."""
