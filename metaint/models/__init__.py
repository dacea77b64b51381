"""Opening a model, learning its shape and its inputs, and auditing its hooks. TransformerLens is touched here."""
