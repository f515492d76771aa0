"""Shapes of what the functions of other packages are given, which torch would else broadcast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..dsl import errors


def check(sizes: Mapping[str, int], axes: Sequence[str], **given: Tensor | None) -> None:
    """That each tensor that is given has the axes of these letters ("BTH"), of these sizes.

    Raises:
        BadShape: the first that has not.
    """
    wanted = tuple(sizes[a] for a in axes)
    for name, x in given.items():
        if x is not None and tuple(x.shape) != wanted:
            expected = f"[{','.join(axes)}] = [{', '.join(map(str, wanted))}]"
            raise errors.BadShape(name, x.shape, expected)


def measure(axes: str, **given: Tensor) -> dict[str, int]:
    """The sizes of the axes of one tensor, by letter.

    Raises:
        BadShape: it has another number of axes.
    """
    ((name, x),) = given.items()
    if x.ndim != len(axes):
        raise errors.BadShape(name, x.shape, f"[{','.join(axes)}]")
    return dict(zip(axes, x.shape, strict=True))
