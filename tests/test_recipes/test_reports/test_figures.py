"""Figures: any text can be drawn, the caller's matplotlib settings are kept, and a failure gives a warning."""

import errno
import logging
import warnings

import matplotlib
import matplotlib.image
import pytest

from sma.recipes.reports.figures import attempt, drawing, label, png, save_figure

NAMES = [
    pytest.param("a $x_$ b.txt", id="not mathematics"),
    pytest.param(r"$\frac{$", id="mathematics without end"),
    pytest.param("notes{draft}%s.txt", id="braces"),
    pytest.param("_^&#<b>|[red]", id="markup"),
    pytest.param("🙂 中文 שלום हिन्दी", id="no glyphs"),
    pytest.param("caf\udce9\n\x1b[0m", id="not UTF-8"),
    pytest.param("x" * 255, id="long"),
    pytest.param("", id="empty"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_drawn_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with drawing(4, 3) as figure:
            axis = figure.subplots()
            axis.plot([0, 1], label=f"x{label(name)}")
            axis.legend()
            axis.set_xticks([0, 1], [label(name, 24)] * 2)
            axis.set_title(label(name))
            figure.suptitle(label(name))
            assert png(figure).startswith(b"\x89PNG")


def test_dollar_signs_are_drawn_literally(tmp_path):
    pictures = []
    for name in ("a $x$ b", "a x b"):
        with drawing(4, 3) as figure:
            figure.suptitle(name)
            save_figure(figure, tmp_path / "figure.png")
        pictures.append(matplotlib.image.imread(tmp_path / "figure.png"))
    assert (pictures[0] != pictures[1]).any()
    # Set as mathematics, the text would lose its dollar signs and be narrower.
    wide = [(picture[..., :3].mean(2) < 0.5).any(0).nonzero()[0] for picture in pictures]
    assert wide[0].max() - wide[0].min() > 1.2 * (wide[1].max() - wide[1].min())


def test_settings_and_figures_of_the_caller_are_unchanged():
    from matplotlib import pyplot

    before, backend, open_figures = dict(matplotlib.rcParams), matplotlib.get_backend(), pyplot.get_fignums()
    with drawing(4, 3) as figure:
        png(figure)
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
    assert pyplot.get_fignums() == open_figures


def test_figure_is_drawn_without_latex_although_the_settings_enable_it():
    with matplotlib.rc_context({"text.usetex": True}), drawing(4, 3) as figure:
        figure.suptitle("a_b % $")
        assert png(figure)


def test_figure_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError), drawing(4, 3) as figure:
        save_figure(figure, path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize(
    "error", [ValueError("x_\n  ^\nParseSyntaxException"), KeyError("draft"), MemoryError(), RuntimeError("a %s {b}")]
)
def test_failed_figure_gives_one_line_of_warning(caplog, error):
    def fail():
        raise error

    with caplog.at_level(logging.WARNING):
        assert attempt("the figure of %s\n{x}", fail) is False
    (record,) = caplog.records
    printed = record.getMessage()
    assert printed.startswith(f"warning: the figure of %s\\n{{x}} was not drawn: {type(error).__name__}")
    assert "\n" not in printed


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_full_disk_and_interruption_are_raised(error):
    def draw():
        raise error

    with pytest.raises(type(error)):
        attempt("a figure", draw)


def test_drawn_figure_gives_no_warning(caplog):
    assert attempt("a figure", lambda: None) is True
    assert caplog.records == []
