"""One token at a time: the declared step in torch, for decoding."""


def step(declaration, args, named, state): ...
