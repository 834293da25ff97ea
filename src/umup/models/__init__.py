"""Architectures: families and shapes as tables (no torch), one decoder, and the builder where plan and model meet."""
