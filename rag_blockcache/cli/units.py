"""Numbers as people read them: bytes, seconds, counts."""

from __future__ import annotations

_PREFIXES = ("kB", "MB", "GB", "TB", "PB")


def format_bytes(num_bytes: float) -> str:
    """Write a size with a decimal unit and two or three digits: ``1.4 GB``, ``512 B``, ``380 MB``."""
    if round(num_bytes) < 1000:
        return f"{round(num_bytes)} B"
    size = float(num_bytes)
    for unit in _PREFIXES:
        size /= 1000
        if round(size) < 1000 or unit == _PREFIXES[-1]:
            break
    return f"{size:.1f} {unit}" if round(size, 1) < 100 else f"{size:,.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """Write a duration at the precision that matters: ``85 ms``, ``2.41 s``, ``3 min 20 s``."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60 / 24:.1f} days"


def format_count(count: int, singular: str, plural: str | None = None) -> str:
    """Write a count with its noun: ``1 passage``, ``2,400 passages``."""
    noun = singular if count == 1 else plural or singular + "s"
    return f"{count:,} {noun}"


def format_share(part: float, whole: float) -> str:
    """Write a part of a whole in percent, and a dash where there is no whole."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def format_value(name: str, value: object) -> str:
    """Format a measured value by the unit in its name: ``_seconds``, ``_bytes``, or none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("_seconds"):
        return format_seconds(value)
    if name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}"
