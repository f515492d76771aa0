"""Draws what a trained model is surprised by: `python -m examples.evaluate_lm`.

A text is a vector of relative perplexities, one for every n-gram in it: how much more the n-gram
surprises the model than the text does on average. The picture has the n-grams at both ends of the
first model's vector, with a bar for every model that is named.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from chunkwise.nn import (
    LanguageModel,
    perplexity,
    perplexity_distance,
    relative_perplexities,
    token_losses,
)

from examples.token_file import rows_of, tokenizer_of

Gram = tuple[int, ...]


def plot(
    vectors: Mapping[str, Mapping[Gram, float]],
    spelled: Callable[[Gram], str],
    path: Path,
    ends: int = 15,
) -> None:
    """Bars of relative perplexities, on a logarithmic scale.

    Args:
        vectors: by the name of a model.
        spelled: an n-gram as text.
        path: the picture: .svg, .png, …
        ends: n-grams at either end.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "evaluate"  # the same picture for the same numbers
    import matplotlib.pyplot as plt

    first = next(iter(vectors.values()))
    ordered = sorted(first, key=lambda gram: first[gram])
    grams = ordered if len(ordered) <= 2 * ends else ordered[:ends] + ordered[-ends:]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.22 * len(grams) * max(1, len(vectors) / 2)))
    height = 0.8 / len(vectors)
    for n, (name, vector) in enumerate(vectors.items()):
        places = [at + (n - (len(vectors) - 1) / 2) * height for at in range(len(grams))]
        # bars begin at 1, the text's own perplexity
        lengths = [vector.get(gram, 1.0) - 1.0 for gram in grams]
        axes.barh(places, lengths, height=height, left=1.0, label=name)
    axes.set(xscale="log", xlabel="perplexity relative to the text's", yticks=range(len(grams)))
    axes.set_yticklabels([spelled(g) for g in grams], fontfamily="monospace", parse_math=False)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.legend(loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=Path("out/text"), help="the folder of tokens")
    parser.add_argument("--model", type=Path, action="append", help="a folder; repeatable")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=64, help="rows kept for validation, at most")
    parser.add_argument("--n", type=int, default=1, help="tokens of an n-gram")
    parser.add_argument("--out", type=Path, default=Path("out/perplexities.svg"))
    args = parser.parse_args(argv)
    rows = rows_of(args.text, "valid", args.tokens)
    tokens = rows.read(range(min(len(rows), args.rows)))
    vectors: dict[str, dict[Gram, float]] = {}
    for folder in args.model or [Path("out/lm/model")]:
        try:
            model = LanguageModel.from_pretrained(folder)
        except FileNotFoundError as missing:
            raise SystemExit(f"--model: {missing}") from None
        losses = token_losses(model, tokens)
        vectors[str(folder)] = relative_perplexities(losses, tokens, args.n)
        print(f"{folder}: perplexity {perplexity(losses):.1f} of {losses.numel()} tokens")
    for a, b in itertools.combinations(vectors, 2):
        print(f"{a} and {b} differ by {perplexity_distance(vectors[a], vectors[b]):.2f}")
    tokenizer = tokenizer_of(args.text)
    plot(vectors, lambda gram: repr(tokenizer.decode(list(gram))), args.out)
    print(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
