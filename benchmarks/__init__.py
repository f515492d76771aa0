"""How fast the compiled recurrences are, against hand-written kernels and the memory floor."""
