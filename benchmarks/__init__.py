"""Benchmarks of compiled recurrences against hand-written kernels and the memory floor."""
