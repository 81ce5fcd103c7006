"""`python -m tracer` is the `trace` command."""

from tracer.cli import main

main()
