"""The one exception that callers of this package are expected to meet."""


class GraphError(ValueError):
    """A bad store, an unknown id, a refused query or a malformed graph, told in one line.

    The line says what was wrong, what was expected and what to do; anything else that is raised is a bug.
    """
