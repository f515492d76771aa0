"""Kernels as Triton source, for GPUs."""
