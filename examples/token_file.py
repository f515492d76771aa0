"""Makes a file of tokens of real text: `python -m examples.token_file --source stdlib`.

Sources are the sources of Python's own library (`stdlib`, 11 MB, always at hand), the documents in
a Debian package (`deb:linux-doc-6.1`, `deb:python3.11-doc`, `deb:dict-gcide`: Debian and Ubuntu
download packages without installing them), and any folder or file. A byte-level BPE is trained on
them; every document begins with its token 0. One document in twenty is kept for validation; a book
in one file is several documents.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START = "<|document|>"  # token 0
_PACKED = (".gz", ".dz")  # a dictionary's .dz is a .gz with a table of places
_SUFFIXES = (".txt", ".rst", ".md", ".py", ".pod", ".txt.gz", ".rst.gz", ".md.gz", ".dict.dz")
_SHORTEST, _LONGEST = 200, 2**20  # characters of a document
_VALIDATION = 20  # one document of so many


def _files(source: str, scratch: Path) -> Iterator[Path]:
    """The files of a source, in order of their names."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
        for path in sorted(root.rglob("*.py")):
            if not left_out & set(path.relative_to(root).parts):
                yield path
        return
    root = Path(source)
    if source.startswith("deb:"):
        root = scratch / source[4:]
        root.mkdir(parents=True)
        subprocess.run(["apt-get", "download", "-q", source[4:]], cwd=scratch, check=True)
        (package,) = scratch.glob(f"{source[4:]}_*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    if not root.exists():
        raise SystemExit(f"no source {source!r}: expected stdlib, deb:PACKAGE, or a path")
    found = [root] if root.is_file() else sorted(root.rglob("*"))
    yield from (p for p in found if p.is_file() and p.name.endswith(_SUFFIXES))


def documents(sources: Sequence[str]) -> Iterator[str]:
    """The texts of all sources; none twice."""
    seen = set[bytes]()
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            for path in _files(source, Path(folder)):
                data = path.read_bytes()
                packed = path.suffix in _PACKED
                whole = (gzip.decompress(data) if packed else data).decode("utf-8", errors="ignore")
                for begin in range(0, len(whole), _LONGEST):
                    text = whole[begin : begin + _LONGEST]
                    digest = hashlib.sha256(text.encode()).digest()
                    if len(text) >= _SHORTEST and digest not in seen:
                        seen.add(digest)
                        yield text


def build(sources: Sequence[str], vocabulary: int, folder: Path) -> None:
    """Write `tokenizer.json`, `train.bin`, `valid.bin`; `about.json` when all are whole.

    Args:
        sources: stdlib, deb:PACKAGE, or paths.
        vocabulary: tokens of the BPE, at most 65536.
        folder: where.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    texts = list(tqdm(documents(sources), desc="reading", unit=" documents"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if len(texts) < 2:
        raise SystemExit(f"{len(texts)} documents in {', '.join(sources)}: expected two or more")
    every = min(_VALIDATION, len(texts))
    counts = {"train": 0, "valid": 0}
    with (folder / "train.bin").open("wb") as train, (folder / "valid.bin").open("wb") as valid:
        files = {"train": train, "valid": valid}
        for begin in tqdm(range(0, len(texts), 256), desc="encoding", unit=" runs"):
            encoded = tokenizer.encode_batch_fast(texts[begin : begin + 256])
            for n, one in enumerate(encoded, begin):
                name = "valid" if n % every == every - 1 else "train"
                ids = np.array([0, *one.ids], dtype=np.uint16)
                files[name].write(ids.tobytes())
                counts[name] += len(ids)
    about = {
        "sources": list(sources),
        "documents": len(texts),
        "bytes": sum(len(t.encode()) for t in texts),
        "vocabulary": tokenizer.get_vocab_size(),
        **counts,
    }
    beside = folder / ".about.json"
    beside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, folder / "about.json")
    print(", ".join(f"{name} {value}" for name, value in about.items()))


@dataclass(frozen=True)
class Rows:
    """A file of tokens cut into rows of T + 1, each of which overlaps the next by one token.

    Attributes:
        tokens: the file, mapped into memory.
        length: T.
    """

    tokens: np.ndarray[tuple[int], np.dtype[np.uint16]]
    length: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def read(self, rows: Sequence[int]) -> Tensor:
        """int64 `[rows, T + 1]`."""
        starts = [row * self.length for row in rows]
        return torch.tensor(
            np.stack([self.tokens[s : s + self.length + 1] for s in starts]).astype(np.int64)
        )

    def drawn(self, step: int, count: int, seed: int) -> list[int]:
        """The rows of a step: every epoch takes all of them in another order."""
        first = step * count
        order, epoch, rows = np.empty(0, dtype=np.int64), -1, []
        for at in range(first, first + count):
            if at // len(self) != epoch:
                epoch = at // len(self)
                order = np.random.default_rng((seed, epoch)).permutation(len(self))
            rows.append(int(order[at % len(self)]))
        return rows

    def most_documents(self, rows: int) -> int:
        """The most documents, begun ones included, that so many rows can hold."""
        starts = np.flatnonzero(self.tokens[: len(self) * self.length] == 0) // self.length
        counts = np.sort(np.bincount(starts, minlength=len(self)))
        return int(counts[-rows:].sum()) + rows


def packed(batch: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as one packed batch, in which no document sees another.

    Args:
        batch: int64 `[B, T + 1]`.
        sequences: how many sequences there are to be, so that shapes do not vary; those that are
            too many are empty.

    Returns:
        The tokens `[1, B T]`, their targets `[1, B T]`, and the boundaries, int32
        `[sequences + 1]`.
    """
    tokens, targets = batch[:, :-1], batch[:, 1:]
    first = tokens == 0
    first[:, 0] = True
    starts = first.flatten().nonzero()[:, 0]
    cu_seqlens = torch.full((sequences + 1,), tokens.numel(), dtype=torch.int32)
    cu_seqlens[: len(starts)] = starts
    return tokens.reshape(1, -1), targets.reshape(1, -1), cu_seqlens


def rows_of(folder: Path, name: str, length: int) -> Rows:
    """The rows of `train` or `valid`."""
    return Rows(np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r"), length)


def vocabulary_of(folder: Path) -> int:
    """How many tokens there are, which needs no tokenizer."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return int(about["vocabulary"])


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a folder."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", action="append", help="stdlib (default), deb:PACKAGE, or a path; repeatable"
    )
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the BPE")
    parser.add_argument("--out", type=Path, default=Path("out/text"), help="the folder")
    args = parser.parse_args(argv)
    build(args.source or ["stdlib"], args.vocabulary, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
