"""Circuits: what heads do together, tested by taking them out; a graph of them, and files to hand it on."""
