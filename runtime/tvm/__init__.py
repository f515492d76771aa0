"""The engine of CPUs: TVM kernels, compiled and run on threads."""
