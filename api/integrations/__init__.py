"""chunkwise under the names by which other packages look for fast kernels.

`transformers` has its models run on chunkwise; `mamba_ssm` and `causal_conv1d` have the functions
of the packages of those names that recurrent models call. Each is imported by its own name.
"""
