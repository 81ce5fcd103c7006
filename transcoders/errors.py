"""The error of this package."""


class TranscoderError(ValueError):
    """Something the caller can mend: one line that says what was wrong, what was expected and what to do."""
