"""``python -m sclkern.pretrain``, the same as ``sclkern pretrain``: what torchrun starts."""

from __future__ import annotations

import sys

from sclkern.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
