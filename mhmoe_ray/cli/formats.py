"""Texts of figures that commands print: metrics, counts, bytes and durations."""

BARS = "▁▂▃▄▅▆▇█"
"""Block characters for plots of one line, lowest first."""


def format_figure(value: float | None, format_spec: str, missing_text: str = "not finite") -> str:
    """Format a metric of a run; return `missing_text` for None, which stands for NaN and infinity in metrics.jsonl."""
    return missing_text if value is None else format(value, format_spec)


def format_nats(value: float | None) -> str:
    """Format a loss in nats with four decimals, as `format_figure` does."""
    return format_figure(value, ".4f")


def format_count(count: int, noun: str) -> str:
    """Format a number with its noun: "1 worker", "2 workers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: int) -> str:
    """Format a number of bytes with three significant digits and a decimal unit: 1.21 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        # From 999.5 on, a number rounds to 1000, which the format g with three digits writes as 1e+03.
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_digits(value: float) -> str:
    """Format a number with three significant digits, or as a whole number if it has more digits before the point."""
    # From 99.95 on, three digits leave no decimals, and from 1000 on the format g would write an exponent.
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """Format a duration with three significant digits in us, ms or s: 48.1 ms."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{format_digits(seconds * factor)} {unit}"
    return f"{format_digits(seconds)} s"
