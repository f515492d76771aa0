"""A recurrence as a package of its own, which needs torch and triton alone."""
