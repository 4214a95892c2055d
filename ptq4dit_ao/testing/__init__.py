"""Models to test with."""
