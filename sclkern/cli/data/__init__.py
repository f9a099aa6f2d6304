"""The commands of ``sclkern data``."""
