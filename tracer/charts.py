"""Small charts as inline SVG and tables with tinted cells; colours and sizes are the page's style sheet's."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 10, 34
N_TICKS = 4
MOST_LABELS = 12

Values = Sequence[float | None]


def lines(
    title: str, series: Mapping[str, Values], *, across: str, top: float | None = None, show: Callable[[float], str]
) -> str:  # fmt: skip
    """Lines over 0, 1, 2, …; `top` ends the vertical axis, by default above the largest value."""
    n = max(len(values) for values in series.values())
    ticks = _ticks(top or _largest(series.values()))
    parts = []
    for number, (name, values) in enumerate(series.items()):
        points = [(_x(i, n), _y(value, ticks[-1]), i, value) for i, value in enumerate(values) if value is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        for x, y, i, value in points:
            tip = _tip(f"{name}, {across} {i}", show(value))
            parts.append(f'<circle class="point s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3">{tip}</circle>')
    step = (WIDTH - LEFT - RIGHT) / n
    labels = [(LEFT + place * step, text) for place, text in numbered(n)]
    return _figure(title, _axes(ticks, labels, across, show) + "".join(parts), list(series) if len(series) > 1 else [])


def bars(
    title: str, values: Sequence[float], names: Sequence[str], labels: Sequence[tuple[float, str]], *, across: str,
    show: Callable[[float], str], apart: int | None = None,
) -> str:  # fmt: skip
    """One bar for each value, with its name where one points at it; the bar `apart` has another colour.

    Labels stand at places counted in bars: 0.5 is the middle of the first one, 1 the edge to the second.
    """
    ticks = _ticks(_largest([values]))
    step = (WIDTH - LEFT - RIGHT) / len(values)
    parts = []
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        y = _y(value, ticks[-1])
        parts.append(
            f'<rect class="bar{" apart" if i == apart else ""}" x="{LEFT + (i + 0.1) * step:.1f}" y="{y:.1f}" '
            f'width="{0.8 * step:.1f}" height="{HEIGHT - BOTTOM - y:.1f}">{_tip(name, show(value))}</rect>'
        )
    places = [(LEFT + place * step, text) for place, text in labels]
    return _figure(title, _axes(ticks, places, across, show) + "".join(parts), [])


def numbered(n: int) -> list[tuple[float, str]]:
    """Labels 0, 1, 2, … below the middles of n bars, or of some of them where they would not fit."""
    return [(i + 0.5, str(i)) for i in range(0, n, math.ceil(n / MOST_LABELS))]


def heat_table(
    corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Values]], show: Callable[[float], str]
) -> str:
    """A table whose cells are tinted by their share of the largest value."""
    largest = _largest(values for _, values in rows)
    head = "".join(f'<th class="number">{escape(column)}</th>' for column in columns)
    body = []
    for name, values in rows:
        cells = "".join(
            '<td class="number quiet">–</td>' if value is None
            else f'<td class="number heat" style="--heat:{value / largest:.0%}">{escape(show(value))}</td>'
            for value in values
        )  # fmt: skip
        body.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>{escape(corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, n_texts: int = 1) -> str:
    """A table whose first columns are texts, the others numbers."""
    head = "".join(_cell("th", column, i >= n_texts) for i, column in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(_cell("td" if i else "th", text, i >= n_texts) for i, text in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, text: str, is_number: bool) -> str:
    kind = ' class="number"' if is_number else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def _figure(title: str, drawing: str, series: Sequence[str]) -> str:
    keys = "".join(f'<li><span class="key s{i}"></span>{escape(name)}</li>' for i, name in enumerate(series))
    legend = f'<ul class="keys">{keys}</ul>' if keys else ""
    return (
        f"<figure><figcaption>{escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{drawing}</svg></figure>'
    )


def _axes(
    ticks: Sequence[float], labels: Sequence[tuple[float, str]], across: str, show: Callable[[float], str]
) -> str:
    rules = "".join(
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(tick, ticks[-1]):.1f}" '
        f'y2="{_y(tick, ticks[-1]):.1f}"/><text class="tick" x="{LEFT - 6}" y="{_y(tick, ticks[-1]) + 4:.1f}">'
        f"{escape(show(tick))}</text>"
        for tick in ticks
    )
    below = "".join(
        f'<text class="label" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}">{escape(text)}</text>' for x, text in labels
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'{rules}{below}<text class="label" x="{middle:.1f}" y="{HEIGHT - 4}">{escape(across)}</text>'


def _tip(name: str, value: str) -> str:
    return f"<title>{escape(name)}: {escape(value)}</title>"


def _x(i: int, n: int) -> float:
    """Where the i-th of n things stands, half a step from both ends."""
    return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / n


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(value, top) / top)


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to the first that is no smaller."""
    power = 10.0 ** math.floor(math.log10(largest / N_TICKS))
    step = next(
        round_step for round_step in (power, 2 * power, 5 * power, 10 * power) if round_step * N_TICKS >= largest
    )
    return [i * step for i in range(math.ceil(largest / step - 1e-9) + 1)]


def _largest(series: Iterable[Values]) -> float:
    """The largest value of all, or 1 where all are 0."""
    return max((value for values in series for value in values if value), default=1.0)
