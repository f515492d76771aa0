"""The language: declare one step of a recurrence, trace it, normalise it, classify it."""

if __name__ == "dsl":  # a second copy of every class would make `isinstance` lie
    raise ImportError("import chunkwise.dsl, not dsl: the top folders are parts of one package")
