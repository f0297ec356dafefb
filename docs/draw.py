"""Draw the figures of docs/concepts.md: `python docs/draw.py` writes docs/compress.svg and docs/layer.svg."""

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
INK, FAINT, PAPER = "#1f2933", "#9aa5b1", "#ffffff"
ROWS = ("#2f6fb0", "#c2571a")
"""Colours of the two rows."""
PALE = "#eef2f6"
CELL = 34
"""Side of a token in pixels."""


class Drawing:
    """A figure in SVG: boxes, tokens, arrows and words on white."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="14" fill="{INK}" role="img">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def words(self, x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> None:
        """Write a line whose baseline is 5 pixels below y."""
        self.parts.append(f'<text x="{x}" y="{y + 5}" text-anchor="{anchor}" {style}>{text}</text>')

    def box(self, x: float, y: float, width: float, height: float, lines: Sequence[str], fill: str = PALE) -> None:
        """Draw a box around lines."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
        )
        top = y + height / 2 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.words(x + width / 2, top + 18 * number, line)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw an arrow through points."""
        path = " L".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path d="M{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>')

    def token(self, x: float, y: float, text: str, fill: str, ink: str = PAPER) -> None:
        """Draw a token with its name."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="{FAINT}"/>')
        self.words(x + CELL / 2, y + CELL / 2, text, style=f'fill="{ink}"')

    def text(self) -> str:
        """Return the figure."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def compress() -> str:
    """Two rows of tokens, gathered for a sub-module and put back."""
    drawing = Drawing(760, 490, "Compress gathers the active tokens of all rows; extract puts the results back")
    rows = ("a b c d e f g h", "p q r s t · · ·")
    active = ("b e f h", "p s")
    left, step = 200, CELL + 4

    def grid(top: float, shown: str) -> None:
        for number, row in enumerate(rows):
            y = top + number * (CELL + 8)
            drawing.words(left - 16, y + CELL / 2, f"row {number}", anchor="end")
            for column, name in enumerate(row.split()):
                chosen = name in active[number].split()
                fill, ink = (ROWS[number], PAPER) if chosen else (PALE, FAINT if name == "·" else INK)
                word = name if shown == "tokens" else f"{name}′" if chosen else "0"
                drawing.token(left + column * step, y, word, fill, ink)

    grid(20, "tokens")
    drawing.words(left + 8 * step + 16, 38, "tokens (B, L, D)", anchor="start")
    drawing.words(left + 8 * step + 16, 80, "· padding", anchor="start")

    packed = [(name, number) for number, names in enumerate(active) for name in names.split()]
    start = left + (8 - len(packed)) / 2 * step
    middle = left + 4 * step - 2
    drawing.arrow((middle, 106), (middle, 160))
    drawing.words(middle + 16, 133, "compress: the active tokens of all rows, no padding", anchor="start")
    for y, mark in ((168, ""), (300, "′")):
        for column, (name, number) in enumerate(packed):
            drawing.token(start + column * step, y, name + mark, ROWS[number])
        drawing.words(left + 8 * step + 16, y + CELL / 2, "ragged tokens (T, D)", anchor="start")
    drawing.words(start - 16, 168 + CELL / 2, "T = 6", anchor="end")
    drawing.arrow((middle, 206), (middle, 225))
    drawing.box(middle - 110, 228, 220, 40, ["sub-module f"], fill="#fdf6d8")
    drawing.arrow((middle, 270), (middle, 296))
    drawing.arrow((middle, 338), (middle, 392))
    drawing.words(middle + 16, 365, "extract: times confidence, back to their positions", anchor="start")
    grid(400, "results")
    drawing.words(left + 8 * step + 16, 418, "results (B, L, D)", anchor="start")
    drawing.words(left + 8 * step + 16, 460, "0 where f did not run", anchor="start")
    return drawing.text()


def layer() -> str:
    """The parts of a layer, from the tokens at the left to the tokens at the right."""
    drawing = Drawing(1010, 335, "A layer: norm, backbone, router, sub-modules, bypass, residual")
    drawing.words(28, 188, "x")
    drawing.arrow((40, 188), (68, 188))
    drawing.box(70, 166, 70, 44, ["norm"])
    drawing.arrow((140, 188), (168, 188))
    drawing.box(170, 158, 120, 60, ["backbone", "every token"])
    drawing.arrow((290, 188), (338, 188), (338, 62), (368, 62))
    drawing.arrow((338, 188), (338, 142), (368, 142))
    drawing.arrow((338, 188), (368, 188))
    drawing.arrow((338, 188), (338, 242), (368, 242))
    drawing.words(314, 176, "m")
    drawing.box(370, 38, 150, 48, ["router"], fill="#e4f1e4")
    drawing.box(370, 122, 290, 40, ["attention: compress, f, extract"], fill="#fdf6d8")
    drawing.box(370, 168, 290, 40, ["mlp: compress, f, extract"], fill="#fdf6d8")
    drawing.box(370, 222, 290, 40, ["bypass: every token"])
    drawing.arrow((520, 62), (590, 62), (590, 118))
    drawing.words(602, 80, "decision: which tokens are active,", anchor="start")
    drawing.words(602, 98, "and their confidence", anchor="start")
    for y in (142, 188, 242):
        drawing.arrow((660, y), (700, y), (700, 188), (728, 188))
    drawing.parts.append(f'<circle cx="744" cy="188" r="14" fill="{PAPER}" stroke="{INK}"/>')
    drawing.words(744, 187, "+")
    drawing.arrow((759, 188), (798, 188))
    drawing.words(778, 176, "y")
    drawing.parts.append(f'<circle cx="814" cy="188" r="14" fill="{PAPER}" stroke="{INK}"/>')
    drawing.words(814, 187, "+")
    drawing.arrow((54, 188), (54, 310), (814, 310), (814, 204))
    drawing.words(434, 298, "residual")
    drawing.arrow((829, 188), (848, 188))
    drawing.box(850, 166, 90, 44, ["silu"])
    drawing.arrow((940, 188), (968, 188))
    drawing.words(982, 188, "out")
    return drawing.text()


FIGURES = {"compress.svg": compress, "layer.svg": layer}
"""Functions that draw the figures, by the names of the files."""

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
