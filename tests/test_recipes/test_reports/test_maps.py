"""Activation maps of a sample, read back from the figure."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from sma.recipes.reports.activation_maps import Example, Modality, binned, draw_map, height_of, printable, wrapped
from tests.cases import generator


def _example(length, layers=2, values=None, texts=None):
    active = torch.rand(layers, length, generator=generator(length)) < 0.3
    return Example(texts or [], 1, 2, active, values)


def _drawn(example, modality):
    figure = Figure(figsize=(14, height_of(example, modality)))
    draw_map(figure, example, modality, "the caption")
    figure.canvas.draw()
    return figure


def test_active_pixels_of_every_layer_are_drawn_over_the_image():
    values = torch.randn(15, generator=generator(1))
    example = _example(15, layers=3, values=values)
    figure = _drawn(example, Modality(image_shape=(3, 5)))
    first, *layers = figure.axes
    assert torch.equal(torch.tensor(first.images[0].get_array().data), values.reshape(3, 5))
    assert len(layers) == 3
    for layer, axis in enumerate(layers):
        ground, overlay = axis.images
        assert torch.equal(torch.tensor(ground.get_array().data), values.reshape(3, 5))
        assert torch.equal(torch.tensor(overlay.get_array().data)[..., 3] > 0, example.active[layer].reshape(3, 5))
        assert axis.get_title() == f"layer {layer}: {float(example.active[layer].double().mean()):.0%}"
    assert figure.get_suptitle() == "the caption"


@pytest.mark.parametrize("length", [400, 16_000])
def test_sound_is_drawn_as_a_wave_over_seconds_with_a_strip_per_layer(length):
    values = torch.randn(length, generator=generator(2))
    example = _example(length, values=values)
    wave, strip = _drawn(example, Modality(sample_rate=length)).axes
    seconds, samples = wave.lines[0].get_data()
    assert seconds[[0, -1]].tolist() == pytest.approx([0, (length - 1) / length])
    assert samples.tolist() == values.tolist()
    assert strip.get_xlim() == (0.0, 1.0)
    assert torch.equal(torch.tensor(strip.images[0].get_array().data), binned(example.active))
    assert wave.get_title(loc="left") == "the caption"


def test_short_text_has_a_name_under_every_position():
    texts = ["[MAX", "$a$", "\n", "9"]
    (axis,) = _drawn(_example(4, texts=texts), Modality()).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["[MAX", "$a$", "⏎", "9"]
    assert axis.images[0].get_array().shape == (2, 4)


@pytest.mark.parametrize("words", [False, True], ids=["characters", "words"])
def test_long_text_is_shown_in_lines_over_marks_of_its_activity(words):
    texts = [
        ("[MED" if number % 3 == 0 else str(number % 10)) if words else chr(97 + number % 26) for number in range(4000)
    ]
    example = _example(4000, texts=texts)
    strip, page = _drawn(example, Modality()).axes
    lines = wrapped(texts)
    shown = lines[-1].first + len(lines[-1].columns)
    assert [text.get_text() for text in page.texts] == texts[:shown]
    assert page.get_xlabel().startswith(f"positions 0 to {shown - 1:,} of 4,000;")
    ground, share = page.images[0].get_array(), example.active.double().mean(0)
    for line, row in zip(lines, ground, strict=True):
        for number, column in enumerate(line.columns, start=line.first):
            assert row[column : column + len(texts[number])].tolist() == [float(share[number])] * len(texts[number])
    assert strip.images[0].get_array().shape == (2, 1000)
    # Legible: no character is wider than its column.
    inches = page.get_position().width * 14
    assert inches / 150 * 1.15 >= 7 * 0.602 / 72


@given(st.lists(st.text("ab(", min_size=0, max_size=9), min_size=1, max_size=400))
@settings(max_examples=40, deadline=None)
def test_lines_are_contiguous_and_tokens_do_not_overlap(texts):
    lines = wrapped(texts)
    place = 0
    for line in lines:
        assert line.first == place
        assert line.columns[0] == 0
        place += len(line.columns)
        ends = [column + len(texts[line.first + number]) for number, column in enumerate(line.columns)]
        assert all(end <= column for end, column in zip(ends, line.columns[1:], strict=False))
        assert max(ends) <= 150
    assert len(lines) <= 7
    assert place == len(texts) or len(lines) == 7


@pytest.mark.parametrize("length", [1, 999, 1000, 1001, 2500, 16_000])
def test_strip_has_the_share_of_each_column(length):
    active = torch.rand(3, length, generator=generator(length)) < 0.5
    strip = binned(active)
    columns = min(length, 1000)
    assert strip.shape == (3, columns)
    for column in (0, columns // 2, columns - 1):
        first, last = column * length // columns, -(-(column + 1) * length // columns)
        torch.testing.assert_close(strip[:, column], active[:, first:last].double().mean(1))


def test_invisible_characters_get_visible_symbols():
    assert printable("a\tb\n\x07é") == "a→b⏎·é"


def test_longer_text_and_more_layers_need_more_room():
    short, long = _example(20, texts=["a"] * 20), _example(2000, texts=["a"] * 2000)
    assert height_of(short, Modality()) < height_of(long, Modality())
    for modality in (Modality(), Modality(sample_rate=10)):
        assert height_of(_example(500, 2, texts=["a"] * 500), modality) < height_of(
            _example(500, 12, texts=["a"] * 500), modality
        )
