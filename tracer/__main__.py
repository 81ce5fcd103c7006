"""`trace` and `python -m tracer`: ready to be interrupted before anything that takes long is imported."""

import signal
import sys

from tracer.errors import INTERRUPTED


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from tracer.cli import main as run

        run()
    except KeyboardInterrupt:
        print(f"trace: {INTERRUPTED}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
