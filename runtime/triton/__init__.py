"""The engine of GPUs: Triton kernels, launched."""
