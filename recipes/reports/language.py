"""The report of a language model: text and figures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sma.model import LanguageModel
from sma.recipes.io.names import plain, shell_word
from sma.recipes.reports.classification import FIGURE, draw_rates, where_figure
from sma.recipes.reports.figures import drawing, save_figure

LINE = 100
"""Bytes per line of the figure."""

_REFERENCES = {
    "xz": "xz -9 of the test text alone",
    "witten_bell_5": "order-5 Witten-Bell model of the training text",
    "xz_with_training_text": "xz -9 after the training text",
}


class LanguageReport(NamedTuple):
    """The behaviour of a model on a held-out text.

    Attributes:
        text: the bytes.
        active: whether any sub-module was active, `(layers, positions)`.
        bits: loss of every byte, in bits; 0 for the first.
    """

    text: bytes
    active: Bool[Tensor, "M T"]
    bits: Tensor

    def describe(self, summary: Mapping[str, Any], out: Path) -> str:
        """The results of a run as text: bits per character, reference scores, activation rates, and suggestions."""
        rates, speed = summary["activation_rate"], summary["tokens_per_second"]
        bits, tested = summary["bits_per_character"], summary["bytes"]["test"]
        lines = ["", f"bits per character   {bits:.3f}   on {tested:,} held-out bytes"]
        for name, value in summary["marks"].items():
            # The key may end in a limit, such as `_last_100MB`.
            known = max((key for key in _REFERENCES if name.startswith(key)), key=len, default="")
            label = _REFERENCES[known] + name.removeprefix(known) if known else name
            lines.append(f"                     {value:.3f}   {label}")
        lines += [
            (
                "activation rate      "
                f"{'   '.join(f'layer {layer}: {rate:.1%}' for layer, rate in enumerate(rates)) or 'nothing is routed'}"
            ),
            f"time                 {summary['seconds']:.0f} s{f', {speed:,} bytes/s in training' if speed else ''}, "
            f"{summary['parameters']:,} parameters, seed {summary['seed']}",
            "",
            f"figure               {where_figure(out)}",
            f"model                {plain(out / 'model')}   (sma.load reads it)",
            f"summary              {plain(out / 'summary.json')}",
            "",
            f"next: python -m sma.recipes.seqboat_lm generate --run {shell_word(out)} "
            '--prompt "The class" --tokens 500',
            f"next: --set training.updates={2 * summary['updates']} trains twice as long",
        ]
        return "\n".join(lines)

    def draw(self, out: Path, title: str) -> Path:
        """Draw a held-out text into `activation.png`, with a bar below every byte for each layer that was active."""
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        layers, length = self.active.shape
        lines = -(-length // LINE)
        with drawing(15, 0.36 * lines + 4.4) as figure:
            page, curves = figure.subplots(2, 1, height_ratios=[0.36 * lines, 3.0])
            figure.suptitle(title, fontsize=13)
            colours = [colormaps["tab10"](layer % 10) for layer in range(layers)]
            for position, byte in enumerate(self.text):
                row, column = divmod(position, LINE)
                for layer in self.active[:, position].nonzero().flatten().tolist():
                    corner, height = (column, row + 0.62 + 0.34 * layer / layers), 0.34 / layers
                    page.add_patch(Rectangle(corner, 1, height, color=colours[layer], linewidth=0))
                # A byte with a high loss is red.
                surprise = min(1.0, float(self.bits[position]) / 8)
                character = chr(byte) if 32 < byte < 127 else {10: "¶", 32: ""}.get(byte, "·")
                page.text(
                    column + 0.5,
                    row + 0.35,
                    character,
                    fontsize=8,
                    family="monospace",
                    ha="center",
                    va="center",
                    color=(surprise, 0, 0),
                )
            page.set(xlim=(0, LINE), ylim=(lines, 0))
            page.axis("off")
            page.set_title(
                "held-out text; a bar below a byte: attention was active; red: a high loss",
                fontsize=10,
                loc="left",
            )
            for layer in range(layers):
                page.plot([], [], color=colours[layer], linewidth=5, label=f"layer {layer}")
            if layers:
                page.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
            draw_rates(curves, out)
            return save_figure(figure, out / FIGURE)


@torch.no_grad()
def read_along(model: LanguageModel, text: Tensor) -> LanguageReport:
    """Record the bytes of a text that activate sub-modules, and the loss of every byte."""
    model.eval()
    ids = text[None].long().to(next(model.parameters()).device)
    output = model(ids)
    logits = cast(Tensor, output.logits)
    bits = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none") / math.log(2)
    layers = [decision.active[0].any(-1) for decision in output.decisions]
    active = torch.stack(layers) if layers else torch.zeros(0, len(text), dtype=torch.bool)
    return LanguageReport(bytes(text.tolist()), active.cpu(), nn.functional.pad(bits, (1, 0)).cpu())
