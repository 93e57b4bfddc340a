"""Timing of the method against a plain implementation: ``python -m benchmarks.benchmark``."""
