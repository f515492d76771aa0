"""Kernels as torch operations, for any device and float dtype."""
