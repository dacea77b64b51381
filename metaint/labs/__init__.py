"""The papers as experiments: train, probe along the way, compare."""
