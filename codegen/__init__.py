"""The compiler: from a normal form to kernels, and from kernels to source."""
