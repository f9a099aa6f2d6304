"""``python -m sclkern.cli``, for where the entry point ``sclkern`` is not installed."""

import sys

from sclkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
