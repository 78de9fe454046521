"""Figures as inline SVG: small, sharp at any size, without scripts, and in the colours of the page's theme.

Shapes are grouped by shade into one path each, so that a figure's size depends on its grid and not on the samples. Colours
are classes of the page's style sheet. Whatever text comes from outside is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that show nothing but change what follows."""
SHADES = 12
WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 40
"""Margins for ticks and labels."""


@dataclass(frozen=True)
class Axis:
    """One axis of a figure."""

    label: str
    """What it shows, with its unit."""
    low: int | float
    """Left or lower end."""
    high: int | float
    """Right or upper end."""
    logarithmic: bool = False

    def place(self, values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Where values lie, 0 at the low end and 1 at the high one.

        Args:
            values: in the unit of the axis; positive where it is logarithmic.
        """
        scale = np.log if self.logarithmic else np.asarray
        low, high = scale(self.low), scale(self.high)
        return (scale(values) - low) / (high - low if high > low else 1.0)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values between the ends.

        Args:
            most: how many at most, about.
        """
        if self.logarithmic and self.high / self.low > 8:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in exponents for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= most + 1:
                    break
            return found[:: math.ceil(len(found) / (most + 1))]
        raw = (self.high - self.low) / most
        if raw <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def number(value: int | float | None, digits: int = 3) -> str:
    """A number for people: few digits, thousands separated, an en dash for none.

    Args:
        value: any number.
        digits: significant ones.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        whole = abs(value) >= 10 ** (digits - 1)
        return f"{value:,.0f}" if whole or value == int(value) else f"{value:.{digits}g}"
    return f"{value:.{digits}g}"


def frame(x: Axis, y: Axis, marks: Markup, title: str) -> Markup:
    """A figure with axes around its marks.

    Args:
        x: horizontal axis.
        y: vertical axis.
        marks: what is drawn, in the figure's coordinates.
        title: what a screen reader says of it.
    """
    parts = [
        Markup('<svg class="figure" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, text_of(title)
        )
    ]
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    grid, labels = [], []
    x_ticks, y_ticks = x.ticks(), y.ticks()
    for tick, at in zip(x_ticks, x.place(np.array(x_ticks)), strict=True):
        place = LEFT + at * inner_width
        grid.append(f"M{place:.1f} {TOP}v{inner_height}")
        labels.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                place, HEIGHT - BOTTOM + 14, number(tick)
            )
        )
    for tick, at in zip(y_ticks, y.place(np.array(y_ticks)), strict=True):
        place = TOP + (1 - at) * inner_height
        grid.append(f"M{LEFT} {place:.1f}h{inner_width}")
        labels.append(
            Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 5, place + 4, number(tick))
        )
    labels.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(LEFT + inner_width / 2, HEIGHT - 6, x.label)
    )
    labels.append(
        Markup('<text transform="rotate(-90)" x="{}" y="11" text-anchor="middle">{}</text>').format(
            -(TOP + inner_height / 2), y.label
        )
    )
    parts += [Markup('<path class="grid" d="{}"/>').format("".join(grid)), marks, *labels, Markup("</svg>")]
    return Markup("").join(parts)


def cells(
    x: Axis, y: Axis, columns: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]],
    rows: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]], weights: Float[np.ndarray, " N"], css: str, palest: float,
) -> Markup:  # fmt: skip
    """Filled rectangles whose shade grows with the logarithm of their weight.

    Args:
        x: horizontal axis.
        y: vertical axis.
        columns: lower and upper ends on x.
        rows: lower and upper ends on y.
        weights: > 0.
        css: class of the colour.
        palest: shade of the smallest weight, 0 to 1.
    """
    if not len(weights):
        return Markup("")
    left, right = (LEFT + x.place(edge) * (WIDTH - LEFT - RIGHT) for edge in columns)
    lower, upper = (TOP + (1 - y.place(edge)) * (HEIGHT - TOP - BOTTOM) for edge in rows)
    level = palest + (1 - palest) * np.log1p(weights - 1) / max(float(np.log(weights.max())), 1.0)
    shade = np.clip(np.ceil(level * SHADES), 1, SHADES).astype(int)
    paths = []
    for s in np.unique(shade).tolist():
        inside = zip(
            left[shade == s], upper[shade == s], (right - left)[shade == s], (lower - upper)[shade == s], strict=True
        )
        d = "".join(f"M{a:.1f} {b:.1f}h{w:.1f}v{h:.1f}h-{w:.1f}z" for a, b, w, h in inside)
        paths.append(Markup('<path class="{} s{}" d="{}"/>').format(css, s, d))
    return Markup("").join(paths)


def line(x: Axis, y: Axis, xs: Float[np.ndarray, " N"], ys: Float[np.ndarray, " N"], css: str) -> Markup:
    """A polyline.

    Args:
        x: horizontal axis.
        y: vertical axis.
        xs: on x.
        ys: on y.
        css: class of the stroke.
    """
    if not len(xs):
        return Markup("")
    across = LEFT + np.clip(x.place(xs), 0, 1) * (WIDTH - LEFT - RIGHT)
    down = TOP + (1 - np.clip(y.place(ys), 0, 1)) * (HEIGHT - TOP - BOTTOM)
    return Markup('<path class="line {}" d="M{}"/>').format(
        css, "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(across, down, strict=True))
    )


def heat_map(
    values: Float[np.ndarray, "P L"], rows: Sequence[str], columns: Sequence[int], *,
    shading: Float[np.ndarray, "P L"], limit: int | float | None, text: str,
) -> Markup:  # fmt: skip
    """A grid of shaded cells, layers across and projections down; the page's script reads out the cell under the pointer.

    Args:
        values: what is read out; NaN leaves a cell empty.
        rows: names of the projections.
        columns: numbers of the layers.
        shading: what is shaded by, such as the values' logarithms.
        limit: for values of both signs, the size that has the full colour; None for values shaded from least to most.
        text: what a screen reader says of it.
    """
    size, height, left, top = max(12, min(44, 300 // max(len(columns), 1))), 20, 44, 4
    width = left + size * len(columns) + 4
    total = top + height * len(rows) + 32
    finite = shading[np.isfinite(shading)]
    low, span = (float(finite.min()), float(np.ptp(finite)) or 1.0) if len(finite) else (0.0, 1.0)
    level = np.abs(shading) / limit if limit else 0.08 + 0.92 * (shading - low) / span
    shade = np.clip(np.round(np.nan_to_num(level) * SHADES), 0, SHADES).astype(int)
    sign = np.where(shading < 0, "less", "more") if limit else np.full(values.shape, "heat")
    paths: dict[tuple[str, int], list[str]] = {}
    for i, j in np.argwhere(np.isfinite(values)).tolist():
        paths.setdefault((str(sign[i, j]), int(shade[i, j])), []).append(
            f"M{left + j * size} {top + i * height}h{size - 1}v{height - 1}h-{size - 1}z"
        )
    drawn = [
        Markup('<path class="{} s{}" d="{}"/>').format(css, s, "".join(d)) for (css, s), d in sorted(paths.items())
    ]
    drawn += [
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 5, top + i * height + 14, name)
        for i, name in enumerate(rows)
    ]
    every = max(1, math.ceil(26 / size))
    drawn += [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            left + j * size + size // 2, total - 18, layer
        )
        for j, layer in enumerate(columns)
        if j % every == 0
    ]
    drawn.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">layer</text>').format(
            left + size * len(columns) // 2, total - 3
        )
    )
    data = " ".join(number(v, 4).replace(",", "") if math.isfinite(v) else "-" for v in values.ravel().tolist())
    head = Markup(
        '<svg class="heatmap" width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img" tabindex="0" aria-label="{text}" data-values="{data}" '
        'data-rows="{rows}" data-columns="{columns}" data-grid="{left} {top} {size} {height}">'
    ).format(
        w=width, h=total, text=text_of(text), data=data, rows="|".join(rows), columns=" ".join(map(str, columns)),
        left=left, top=top, size=size, height=height,
    )  # fmt: skip
    return Markup("").join([head, *drawn, Markup("</svg>")])


def text_of(value: object) -> Markup:
    """Outside text, escaped, with control characters made visible so that nothing hides or reorders what follows.

    Args:
        value: anything with a string.
    """
    return escape(visible(str(value)))


def visible(text: str) -> str:
    """Text in which control characters, those of writing direction included, are shown by their numbers.

    Args:
        text: any.
    """
    return HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
