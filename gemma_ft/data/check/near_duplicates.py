"""Texts that are nearly the same, found without comparing each with each: MinHash, and buckets of equal parts of it.

Three words in a row are one element of a text's set; two texts are alike as their sets are (Jaccard). N texts.
Source: Broder, "On the resemblance and containment of documents", 1997; Leskovec et al., "Mining of Massive Datasets",
section 3.4 (banding).
"""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

import numpy
from datasketch import MinHash

ALIKE = 0.8  # Jaccard: about one word in 27 differs
WORDS = 3
FEWEST = 5  # sets that are smaller say too little
NUM_PERM = 128
BANDS, BAND_ROWS = 18, 7  # texts that are ALIKE share a band in 98.6% of all cases, those half alike in 13%
NEIGHBOURS = 3  # in a bucket that each text is compared with, besides its first
AT_ONCE = 16_384  # elements, and pairs: what is held for them has a few MB
SAMPLED = 1000  # texts that decide what is boilerplate
BOILERPLATE = 0.5  # share of them that has an element: it belongs to a template then
FEWEST_SAMPLED = 20
WORD = re.compile(r"\w+|[^\w\s.,;:!?\"'()’“”]")  # signs count, punctuation does not: 2+2 is not 2-2


class NearPair(NamedTuple):
    """Two keys, in the order in which they were added, and how alike their texts are: 0 to 1, by estimate."""

    earlier: int
    later: int
    alike: float


class NearTexts:
    """Takes texts and keeps a signature of each; `pairs` says which are alike.

    What stands in most of the first SAMPLED texts is left out of all: a long prompt that rows share does not make them
    alike. (Nor is it told, then, when most of all rows are copies of one with a word changed.)
    """

    def __init__(self) -> None:
        self._empty = MinHash(num_perm=NUM_PERM, hashfunc=int)
        self._waiting: list[tuple[int, Any]] = []
        self._boilerplate: Any = None
        self._keys: list[int] = []
        self._signatures: list[Any] = []

    def add(self, key: int, text: str) -> None:
        """One more text; keys are counted upwards."""
        elements = _elements(text)
        if self._boilerplate is None:
            self._waiting.append((key, elements))
            if len(self._waiting) == SAMPLED:
                self._settle()
        else:
            self._sign(key, elements)

    def pairs(self) -> list[NearPair]:
        """Pairs that are at least ALIKE, sorted. Of many alike not every pair is there, but each but the first has an
        earlier one.
        """
        self._settle()
        if len(self._keys) < 2:
            return []
        signatures = numpy.stack(self._signatures)
        found: list[NearPair] = []
        candidates = _candidates(signatures)
        for start in range(0, len(candidates), AT_ONCE):
            one, two = candidates[start : start + AT_ONCE].T
            alike = (signatures[one] == signatures[two]).mean(axis=1)
            for number in numpy.flatnonzero(alike >= ALIKE).tolist():
                found.append(NearPair(self._keys[one[number]], self._keys[two[number]], float(alike[number])))
        return sorted(found)

    def _settle(self) -> None:
        """Decides what is boilerplate, and signs the texts that have waited for it."""
        if self._boilerplate is not None:
            return
        waiting, self._waiting = self._waiting, []
        every = [elements for _, elements in waiting] or [numpy.zeros(0, numpy.uint32)]
        elements, counts = numpy.unique(numpy.concatenate(every), return_counts=True)
        self._boilerplate = elements[counts > max(FEWEST_SAMPLED, BOILERPLATE * len(waiting))]
        for key, one in waiting:
            self._sign(key, one)

    def _sign(self, key: int, elements: Any) -> None:
        kept = elements[~numpy.isin(elements, self._boilerplate)] if len(self._boilerplate) else elements
        if len(kept) < FEWEST:
            return
        signed = self._empty.copy()
        for start in range(0, len(kept), AT_ONCE):  # datasketch holds NUM_PERM numbers for each
            signed.update_batch(kept[start : start + AT_ONCE].tolist())
        self._keys.append(key)
        self._signatures.append(signed.digest())


def likeness(one: str, other: str) -> float:
    """How alike two texts are: the Jaccard index of their sets, 0 to 1; 0 for sets that are too small."""
    first, second = _elements(one), _elements(other)
    if min(len(first), len(second)) < FEWEST:
        return 0.0
    shared = len(numpy.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def _elements(text: str) -> Any:
    """The set of a text, each element as a hash: uint32, sorted."""
    words = numpy.array([zlib.crc32(word.encode()) for word in WORD.findall(text.casefold())], numpy.uint32)
    count = max(len(words) - WORDS + 1, 0)
    elements = numpy.zeros(count, numpy.uint32)
    for offset in range(WORDS):
        elements = elements * numpy.uint32(0x9E3779B1) + words[offset : offset + count]  # mod 2**32
    return numpy.unique(elements)


def _candidates(signatures: Any) -> Any:
    """(earlier, later) numbers of texts that share a bucket of some band: int64 [pairs, 2]. Each is paired with the
    first of its bucket and with its NEIGHBOURS before it: a bucket may be as large as the data set.

    datasketch.MinHashLSH with these bands has a bucket's members only all together, text by text in Python. Measured on
    two cores, signing included: 20,000 made-up texts take it 9.9 s and 255 MiB, this 2.3 s and 117 MiB; the questions
    of GSM8K 3.7 s, this 0.95 s; the same pairs in both. With 8,000 near copies of one text among 20,000 it did not end
    in 100 s; this takes 0.5 s.
    """
    found = []
    for band in range(BANDS):
        part = numpy.ascontiguousarray(signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS])
        keys = part.view(f"V{part.itemsize * BAND_ROWS}").ravel()
        _, buckets = numpy.unique(keys, return_inverse=True)
        order = numpy.argsort(buckets, kind="stable")
        sorted_buckets = buckets[order]
        firsts = numpy.searchsorted(sorted_buckets, sorted_buckets)
        at = numpy.arange(len(order))
        for before in (firsts, *(at - distance for distance in range(1, NEIGHBOURS + 1))):
            inside = (before >= firsts) & (before < at)
            found.append(numpy.stack([order[before[inside]], order[at[inside]]], axis=1))
    return numpy.unique(numpy.concatenate(found), axis=0)
