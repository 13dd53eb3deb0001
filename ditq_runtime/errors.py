"""The exceptions a user of the runtime may meet; each message names what was expected, what came, what to do."""


class CheckpointError(ValueError):
    """A packed checkpoint is damaged, incomplete or of another version; the message names tensor or file."""


class FallbackError(RuntimeError):
    """A layer that the scheme promises in integers did not run so."""
