"""Number and time formats of the pages and the terminal."""

from datetime import UTC, datetime


def percent(fraction: float | None) -> str:
    """Return '12.5 %' with a no-break space: one decimal, two below one percent, a dash for None."""
    if fraction is None:
        return "–"
    return f"{fraction * 100:.{2 if 0 < round(fraction, 4) < 0.01 else 1}f}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def significant(value: float) -> str:
    """Return four significant digits: '0.001235', '12.35', '12,346'."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return `1 h 02 min`, `3 min 05 s` or `12 s`; one decimal below ten seconds."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def moment(milliseconds: float) -> str:
    """Return a time since 1970 as '2026-11-21 18:32:05 UTC'; a dash outside the years 1970 to 9999."""
    if not 0 <= milliseconds < 253_402_300_800_000:  # the year 10000
        return "–"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
