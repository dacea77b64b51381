"""The exceptions of metaint: each carries one sentence with the argument, what it was, and what would do."""


class MetaintError(Exception):
    """The family; the shell prints its sentence and exits with status 2."""


class InputError(MetaintError, ValueError):
    """An argument (tokens, a mask, a text, a name) is not what the call needs."""


class ModelError(MetaintError, RuntimeError):
    """A model can't be opened, or lacks what was asked of it."""


class HookAuditError(ModelError):
    """A hook that a probe needs is missing or does not carry what its name says."""


class ActivationError(MetaintError, FloatingPointError):
    """An activation holds NaN or infinity; the sentence names the layer and the hook."""


class StoreError(MetaintError, OSError):
    """A scan can't be written or read."""
