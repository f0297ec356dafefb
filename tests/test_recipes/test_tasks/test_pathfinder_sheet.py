"""The contact sheet of Pathfinder's images."""

import numpy as np
from PIL import Image

from sma.recipes.tasks.pathfinder.images import PathfinderSettings
from sma.recipes.tasks.pathfinder.sheet import contact_sheet, main
from sma.recipes.tasks.pathfinder.stimulus import draw_stimulus


def test_contact_sheet_has_positives_on_the_left(tmp_path, capsys):
    arguments = [
        "--size",
        "20",
        "--set",
        "contour_length=4",
        "--set",
        "seed_frame=6",
        "--rows",
        "2",
        "--columns",
        "3",
        "--scale",
        "2",
    ]
    assert main([*arguments, "--out", str(tmp_path / "sheet.png")]) == 0
    assert "6 images with both discs on one contour (left)" in capsys.readouterr().out
    settings = PathfinderSettings(size=20, contour_length=4, seed_frame=6)
    sheet = contact_sheet(settings, 2, 3, 0)
    assert sheet.shape == (48, 148)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert np.array_equal(np.asarray(picture.convert("L")), np.kron(sheet, np.ones((2, 2), dtype=np.uint8)))
    stimuli = [draw_stimulus(settings, 0, number) for number in range(40)]
    for label, left in ((1, 2), (0, 2 + 3 * 24 + 4)):
        first = next(stimulus.image for stimulus in stimuli if stimulus.label == label)
        assert np.array_equal(sheet[2:22, left : left + 20], first)


def test_sheet_that_cannot_be_drawn_gives_an_error_message(tmp_path, capsys):
    assert main(["--size", "20", "--set", "contour_length=1"]) == 2
    assert "contour_length" in capsys.readouterr().err
    assert main(["--size", "32", "--rows", "1", "--columns", "1", "--out", str(tmp_path / "no" / "sheet.png")]) == 2
    assert "No such file or directory; choose another --out" in capsys.readouterr().err
