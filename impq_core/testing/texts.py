"""Texts generated from a seed, for tests that need prose without a file, a network or a library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

_ONSETS = ("b", "br", "c", "d", "dr", "f", "g", "gl", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr",
           "v", "w")
_VOWELS = ("a", "ai", "e", "ea", "i", "o", "ou", "u")
_CODAS = ("", "", "l", "ck", "m", "n", "nd", "r", "rt", "s", "sh", "t")
_PREPOSITIONS = ("above", "after", "at", "behind", "for", "from", "in", "near", "of", "under", "with", "without")
_SENTENCES = (
    "the {w} {w} {w}ed {p} the {w} {w}.", "a {w} of {w} {w}s {w} {p} every {w}.",
    "if the {w} {w}s, its {w} will {w} {p} {w} {w}s.", "{w} and {w} are {w} {w}s {p} a {w}.",
    "no {w} {w}ed the {w}, but {p} {w} {w}s did.", "{p} {w} {w}s, {w} the {w} by {w} {w}s.",
    "when {w} {w}s, most of the {w}s {w} {p} {w}.", "her {w} was {w}er than the {w} {w} {p} {w}.")
"""{w} is an invented word, {p} a preposition."""


def made_text(seed: int, characters: int) -> str:
    """Paragraphs of invented words in English sentence patterns.

    The text depends only on the arguments: it is drawn from the raw stream of a PCG64 generator, which numpy keeps the
    same between versions. Texts of different seeds share no run of 32 characters, unless by a chance that is negligible
    for texts of up to a million characters.

    Args:
        seed: of the draw.
        characters: length of the text.

    Returns:
        ASCII text of exactly ``characters`` characters.
    """
    draw = _draws(seed)
    pieces: list[str] = []
    size = 0
    while size < characters:
        end = "\n\n" if draw(6) == 0 else " "
        pieces.append(_sentence(draw) + end)
        size += len(pieces[-1])
    return "".join(pieces)[:characters]


def _draws(seed: int) -> Callable[[int], int]:
    """A function that draws an integer from 0 to its argument, which is not included."""
    stream = _stream(seed)
    return lambda stop: next(stream) % stop


def _stream(seed: int) -> Iterator[int]:
    generator = np.random.PCG64(seed)
    while True:
        yield from generator.random_raw(4096).tolist()


def _sentence(draw: Callable[[int], int]) -> str:
    def fill(slot: re.Match[str]) -> str:
        return _word(draw) if slot[0] == "{w}" else _PREPOSITIONS[draw(len(_PREPOSITIONS))]

    sentence = re.sub(r"{[wp]}", fill, _SENTENCES[draw(len(_SENTENCES))])
    return sentence[0].upper() + sentence[1:]


def _word(draw: Callable[[int], int]) -> str:
    """One or two syllables; each is one of some two thousand."""
    syllables = 1 + (draw(4) > 0)
    return "".join(_ONSETS[draw(len(_ONSETS))] + _VOWELS[draw(len(_VOWELS))] + _CODAS[draw(len(_CODAS))]
                   for _ in range(syllables))
