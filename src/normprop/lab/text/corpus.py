"""A text as numbers, divided into what is trained on and what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from normprop.errors import NormPropError
from normprop.lab.names import unknown
from normprop.lab.samples.datasets import TEXTS, data_root


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text whose end is held out: first comes what is trained on, then a part for validation, then one for the test.

    Attributes:
        name: The name it was loaded by.
        symbols: The characters that occur, sorted; a character is its place among them.
        train: Characters, int64 `(n,)`.
        validation: Likewise.
        test: Likewise, the very end.
    """

    name: str
    symbols: str
    train: Tensor
    validation: Tensor
    test: Tensor

    def decoded(self, places: Tensor) -> str:
        """The text of characters `(n,)`."""
        return "".join(self.symbols[place] for place in places.tolist())

    def encoded(self, text: str) -> Tensor:
        """The characters of a text, int64 `(n,)`.

        Raises:
            NormPropError: for a character that doesn't occur in the corpus.
        """
        foreign = sorted(set(text) - set(self.symbols))
        if foreign:
            raise NormPropError(f"{self.name} has no {foreign[0]!r}.\nUse only characters that occur in it.")
        return torch.tensor([self.symbols.index(character) for character in text], dtype=torch.int64)


def divided(name: str, text: str, *, held_out: float = 0.05) -> Corpus:
    """A corpus of a text.

    Args:
        name: What it is called.
        text: All of it.
        held_out: Share of the text for the test, at its end; validation takes as much before that.

    Raises:
        NormPropError: for a text or a share that leaves a part with fewer than two characters.

    Example:
        >>> corpus = divided("rhyme", "abab" * 10, held_out=0.1)
        >>> corpus.symbols, len(corpus.train), corpus.decoded(corpus.test)
        ('ab', 32, 'abab')
    """
    if not 0 < held_out < 0.5:
        raise NormPropError(f"--held-out is {held_out}.\nUse a share between 0 and 0.5, such as 0.05.")
    symbols = "".join(sorted(set(text)))
    place = {symbol: k for k, symbol in enumerate(symbols)}
    part = int(held_out * len(text))
    if part < 2:
        raise NormPropError(
            f"{name} has {len(text)} characters, too few to hold out a share of {held_out}.\nUse a longer text."
        )
    numbers = torch.tensor([place[character] for character in text], dtype=torch.int64)
    train, validation, test = numbers.split([len(text) - 2 * part, part, part])
    return Corpus(name, symbols, train, validation, test)


def read(data: str, *, held_out: float = 0.05, root: Path | None = None) -> Corpus:
    """A text by name or from a file in UTF-8.

    Args:
        data: `shakespeare`, which is `shakespeare.txt` under `root`, or the path of a file.
        held_out: As for `divided`.
        root: The folder for named texts; by default `data_root()`.

    Raises:
        NormPropError: for a name that is unknown, or a file that is missing or no text.
    """
    root = root or data_root()
    path = root / f"{data}.txt" if data in TEXTS else Path(data).expanduser()
    if not path.is_file():
        if data in TEXTS:
            raise NormPropError(
                f"There is no {path}.\nPut the text there, set NORMPROP_DATA to the folder that has {path.name}, "
                "or give any text: --data FILE.txt."
            )
        raise unknown("text", data, TEXTS, "A path works too: FILE.txt, in UTF-8.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NormPropError(f"{path} isn't a text in UTF-8: {error}.\nConvert it, or choose another file.") from error
    return divided(path.stem, text, held_out=held_out)
