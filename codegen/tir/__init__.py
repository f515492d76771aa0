"""Kernels as TVM's TIR, for CPUs."""
