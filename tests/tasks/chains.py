"""What the tests of the bigram task share: a text of a few words, and the chain of tiny-Shakespeare."""

import json
import random
from pathlib import Path

import torch

from metaint.tasks import BigramTask

STORED = json.loads((Path(__file__).parents[1] / "data" / "tinyshakespeare_counts.json").read_text())
SENTENCE = "the cat sat on a mat and ate rats that had no dog to nod all day"
TEXT = " ".join(random.Random(0).choices(SENTENCE.split(), k=2000))


def shakespeare(**options) -> BigramTask:
    """The chain of tiny-Shakespeare, from its stored counts."""
    first, second, counts = torch.tensor(STORED["bigram"]).T
    chain = torch.sparse_coo_tensor(torch.stack([first, second]), counts, (65, 65), check_invariants=True)
    return BigramTask.from_counts(torch.tensor(STORED["unigram"]), chain, STORED["vocabulary"], **options)
