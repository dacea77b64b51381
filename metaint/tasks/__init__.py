"""What a model is fed: repeated random tokens, windows of text, in-context bigrams."""

from metaint.tasks.bigram import BigramTask, bigram
from metaint.tasks.repeated import repeated_tokens
from metaint.tasks.text import python_prose, read_text, text_windows

__all__ = ["BigramTask", "bigram", "python_prose", "read_text", "repeated_tokens", "text_windows"]
