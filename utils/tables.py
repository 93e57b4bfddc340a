"""Tables for people: aligned text for terminals, Markdown for documents."""

from collections.abc import Collection, Sequence

MEDIANS = "L0, L2, L_inf: medians over the images that the attack broke."


def number(value: float | None, digits: int) -> str:
    """``value`` with so many digits after the point, ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def text_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Aligned columns; the first row is the header, the columns in ``left`` are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in (rows[0], ["-" * width for width in widths], *rows[1:]):
        cells = enumerate(zip(row, widths))
        cells = [c.ljust(width) if i in left else c.rjust(width) for i, (c, width) in cells]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same in Markdown."""
    rule = ["---" if i in left else "---:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
