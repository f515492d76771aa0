"""Chunks, kernels and their costs as text."""
