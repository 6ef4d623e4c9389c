"""Benchmarks: their items, one way to ask and score them, and the figures that come out."""
