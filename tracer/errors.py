"""The error of this package."""


class TraceError(ValueError):
    """Something the caller can mend: one line that says what was wrong, what was expected and what to do."""
