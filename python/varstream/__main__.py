"""``python -m varstream`` is the ``varstream`` command."""

from varstream.cli import main

main()
