"""Benchmarks: declared protocols, run end to end with their from-scratch twins, and what may be said of the result."""
