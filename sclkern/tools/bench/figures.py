"""Figures as tables and plots write them."""

from __future__ import annotations

# The implementation that others are compared with.
OURS = "sclkern"


def seconds_text(seconds: float) -> str:
    """Three digits with s, ms or µs."""
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * f >= 1 or u == "µs")
    return f"{three_digits(seconds * factor)} {unit}"


def memory_text(size: float) -> str:
    """Three digits with MB or GB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def three_digits(number: float) -> str:
    """Rounded to three digits, without an exponent below a million."""
    return f"{float(f'{number:.3g}'):g}"
