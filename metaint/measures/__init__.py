"""The mathematics: pure functions, tensors in, tensors out, no model and no hook. One file a subject."""
