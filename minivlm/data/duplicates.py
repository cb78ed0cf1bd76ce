"""When two rows say the same: keys of pictures and texts, and MinHash signatures of texts that nearly agree.

Keys and signatures are made where rows are validated, a few bytes each; `near_duplicates` compares them in the driver.
Pure: numpy alone.
"""

import base64
import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from minivlm.schema import IMAGE_PLACEHOLDER

SHINGLE_CHARS = 5
SIGNATURE_BYTES = 120
"""One byte for each of as many permutations. A multiple of 3, so that base64 adds no padding."""

MIN_RECALL = 0.99
"""Chance that two texts of just the asked similarity are compared at all; sets the width of the bands."""

MAX_COMPARED = 200
"""Rows kept in one bucket that a new one is compared with: texts from one template share many buckets."""

WHITE_SPACE = re.compile(r"\s+")
_CHUNK_SHINGLES = 2048


def plain_text(text: str) -> str:
    """What counts of a text: without placeholders, letter case, width of characters and white space."""
    bare = unicodedata.normalize("NFKC", text.replace(IMAGE_PLACEHOLDER, " ")).casefold()
    return WHITE_SPACE.sub(" ", bare).strip()


def row_key(pictures: Sequence[str], texts: Sequence[str]) -> int:
    """Signed 64 bits, equal for rows with the same pictures in the same order and the same plain texts."""
    digest = blake2b(digest_size=8)
    for part in (*pictures, "", *map(plain_text, texts)):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little", signed=True)


def text_signature(texts: Sequence[str]) -> str:
    """MinHash of the pieces of five characters of the plain texts, one byte per permutation, as base64.

    Two signatures agree in a share of about J + (1 - J) / 256 of their bytes, J the Jaccard similarity of the pieces.

    Source: Broder 1997, "On the resemblance and containment of documents"; Li and Koenig 2010, "b-Bit Minwise Hashing".
    """
    points = np.frombuffer("\n".join(map(plain_text, texts)).encode("utf-32-le"), np.uint32).astype(np.uint64)
    pieces = points[: max(len(points) - SHINGLE_CHARS + 1, 1)].copy()
    for shift in range(1, SHINGLE_CHARS):
        following = points[shift : shift + len(pieces)]
        pieces = pieces * np.uint64(0x100000001B3)
        pieces[: len(following)] += following
    pieces = np.unique(mix_bits(pieces)) if len(pieces) else np.zeros(1, np.uint64)
    least = np.full(SIGNATURE_BYTES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(pieces), _CHUNK_SHINGLES):
        permuted = mix_bits(pieces[start : start + _CHUNK_SHINGLES, None] ^ _SEEDS)
        least = np.minimum(least, permuted.min(axis=0))
    return base64.b64encode(least.astype(np.uint8).tobytes()).decode()


def decode_signatures(signatures: Sequence[str]) -> np.ndarray:
    """[n, SIGNATURE_BYTES] uint8."""
    return np.frombuffer(base64.b64decode("".join(signatures)), np.uint8).reshape(-1, SIGNATURE_BYTES)


def near_duplicates(
    signatures: np.ndarray, groups: np.ndarray, *, similarity: float, always_kept: np.ndarray
) -> np.ndarray:
    """Which rows are nearly the same as an earlier one that is kept.

    Rows are compared where a band of their signatures agrees, each with at most MAX_COMPARED earlier ones per band.
    What is kept has no near duplicate among what was compared, so a second call drops nothing.

    Args:
        signatures: [n, SIGNATURE_BYTES] uint8, in the order that says which row is earlier.
        groups: [n] uint64; only rows of one group are compared.
        similarity: Jaccard, 0 to 1.
        always_kept: [n] bool, rows that others are compared with but that stay.

    Returns:
        [n] bool.

    Source: banding as in Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.
    """
    needed = SIGNATURE_BYTES * (similarity + (1 - similarity) / 256)
    buckets = _shared_buckets(signatures, groups, band_width(similarity))
    room = np.minimum(np.bincount(buckets[buckets >= 0]), MAX_COMPARED)
    first = np.cumsum(room) - room
    kept, num_kept = np.empty(room.sum(), np.int32), np.zeros(len(room), np.int32)
    found = np.zeros(len(signatures), bool)
    for row in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
        mine = buckets[row][buckets[row] >= 0]
        counts = num_kept[mine]
        if counts.any() and not always_kept[row]:
            ends = np.cumsum(counts)
            others = np.unique(kept[np.arange(ends[-1]) + np.repeat(first[mine] - ends + counts, counts)])
            found[row] = (signatures[others] == signatures[row]).sum(axis=1).max() >= needed
        if not found[row]:
            open_ones = mine[counts < room[mine]]
            kept[first[open_ones] + num_kept[open_ones]] = row
            num_kept[open_ones] += 1
    return found


def band_width(similarity: float) -> int:
    """Bytes in a band: as many as keep the chance of comparing two such texts above MIN_RECALL."""
    recalls = {width: 1 - (1 - similarity**width) ** (SIGNATURE_BYTES // width) for width in range(1, 21)}
    return max(width for width, recall in recalls.items() if width == 1 or recall >= MIN_RECALL)


def _shared_buckets(signatures: np.ndarray, groups: np.ndarray, width: int) -> np.ndarray:
    """[n, bands] int32: the number of a row's bucket in each band, -1 where no other row is in it."""
    bands = SIGNATURE_BYTES // width
    buckets = np.full((len(signatures), bands), -1, np.int32)
    first = 0
    for band in range(bands):
        keys = groups ^ np.uint64(band)
        for column in signatures[:, band * width : (band + 1) * width].T:
            keys = mix_bits(keys ^ column)
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        number = np.where(counts > 1, first + np.cumsum(counts > 1) - 1, -1)
        buckets[:, band] = number[inverse]
        first += int((counts > 1).sum())
    return buckets


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Each uint64 as another that looks random (the finalizer of splitmix64: Steele, Lea and Flood 2014)."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SEEDS = mix_bits(np.arange(1, SIGNATURE_BYTES + 1, dtype=np.uint64))
