"""Preference data: files in the formats people have, as records, as token ids and as batches. See docs/data.md."""

from dpofast.data.batching import Batch, collate
from dpofast.data.encoding import Answer, Cut, Encoded, Encoder
from dpofast.data.formats import FORMATS, detect, normalise
from dpofast.data.loading import Shuffle, shuffle
from dpofast.data.reading import Records, read
from dpofast.data.records import BadRow, Record, Skipped

__all__ = [
    "FORMATS", "Answer", "BadRow", "Batch", "Cut", "Encoded", "Encoder", "Record", "Records", "Shuffle", "Skipped",
    "collate", "detect", "normalise", "read", "shuffle",
]  # fmt: skip
