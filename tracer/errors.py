"""The error of this package, and what is said when somebody ends it."""

INTERRUPTED = "interrupted; what was not finished was not saved, run the same command again."


class TraceError(ValueError):
    """Something the caller can mend: one line that says what was wrong, what was expected and what to do."""
