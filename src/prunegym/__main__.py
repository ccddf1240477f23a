"""``python -m prunegym``: the same as the ``prunegym`` command."""

import sys

from prunegym.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
