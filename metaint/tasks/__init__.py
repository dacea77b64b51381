"""What a model is fed: repeated random tokens, windows of text, in-context bigrams, autoregressive vectors."""

from metaint.tasks.autoregressive import (
    AutoregressiveSample,
    RegressionSample,
    augmented,
    autoregressive,
    embedding_windows,
    regression,
)
from metaint.tasks.bigram import BigramTask, bigram
from metaint.tasks.repeated import repeated_tokens
from metaint.tasks.text import alike_tokens, python_prose, read_text, text_windows

__all__ = [
    "AutoregressiveSample",
    "BigramTask",
    "RegressionSample",
    "alike_tokens",
    "augmented",
    "autoregressive",
    "bigram",
    "embedding_windows",
    "python_prose",
    "read_text",
    "regression",
    "repeated_tokens",
    "text_windows",
]
