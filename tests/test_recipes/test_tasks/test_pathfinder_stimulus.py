"""Pathfinder stimulus: properties of the task from the generator's geometry, and images against a slow drawing."""

import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from sma.errors import DataError, SpecError
from sma.recipes.tasks.pathfinder import stimulus as pathfinder_stimulus
from sma.recipes.tasks.pathfinder.images import PathXSettings
from sma.recipes.tasks.pathfinder.stencils import pixels_of
from sma.recipes.tasks.pathfinder.stimulus import StimulusSettings, draw_stimulus, stencils_of

LRA = StimulusSettings()
PATHX = PathXSettings()
SHORT = StimulusSettings(size=24, contour_length=5, distractors=3, distractor_length=2, seed_frame=6, margins=(1, 2))

CASES = [
    pytest.param((LRA, 120), id="32-px"),
    pytest.param((PATHX, 8), id="128-px"),
    pytest.param((SHORT, 200), id="short"),
]
drawn = {}


@pytest.fixture(params=CASES)
def case(request):
    """Settings, and the first samples of seed 0."""
    settings, count = request.param
    if id(settings) not in drawn:
        drawn[id(settings)] = [draw_stimulus(settings, 0, number) for number in range(count)]
    return settings, drawn[id(settings)]


def groups_of(stimulus):
    return [*stimulus.contours, *stimulus.distractors]


def window(settings, stimulus, dash, bits_or_picture):
    """Map from the pixels (row, column) drawn around a dash to their values."""
    stencils = stencils_of(settings, stimulus.margin)
    if isinstance(bits_or_picture, int):
        rows, columns = pixels_of(bits_or_picture, stencils.stride)
        values = [1.0] * len(rows)
    else:
        rows, columns = bits_or_picture.nonzero()
        values = bits_or_picture[rows, columns].tolist()
    top, left = dash.pivot[0] - stencils.reach, dash.pivot[1] - stencils.reach
    return {
        (top + row, left + column): value
        for row, column, value in zip(rows.tolist(), columns.tolist(), values, strict=True)
    }


def footprint(settings, stimulus, dash):
    return set(
        window(settings, stimulus, dash, stencils_of(settings, stimulus.margin).directions[dash.direction].footprint)
    )


def picture(settings, stimulus, dash):
    return window(settings, stimulus, dash, stencils_of(settings, stimulus.margin).directions[dash.direction].picture)


def test_discs_are_on_one_contour_if_and_only_if_the_label_is_1(case):
    for stimulus in case[1]:
        begins = [number for number, contour in enumerate(stimulus.contours) if contour[0].near == stimulus.discs[0]]
        ends = [number for number, contour in enumerate(stimulus.contours) if contour[-1].far == stimulus.discs[1]]
        assert (begins, ends) == ([stimulus.marked[0]], [stimulus.marked[1]])
        assert stimulus.label == int(begins == ends)


@pytest.mark.parametrize(
    "settings", [SHORT, SHORT.model_copy(update={"margins": (1,)})], ids=["two-margins", "one-margin"]
)
def test_labels_and_discs_are_balanced(settings):
    found = Counter(
        (stimulus.label, stimulus.marked[0])
        for stimulus in (draw_stimulus(settings, 1, number) for number in range(600))
    )
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(abs(count - 150) < 4 * math.sqrt(600 * 0.25 * 0.75) for count in found.values())


def test_margins_are_all_used():
    found = Counter(stimulus.margin for stimulus in (draw_stimulus(SHORT, 1, number) for number in range(200)))
    assert set(found) == {1, 2}
    assert min(found.values()) > 60


def test_contours_have_their_lengths(case):
    settings, stimuli = case
    for stimulus in stimuli:
        assert [len(contour) for contour in stimulus.contours] == [settings.contour_length] * 2
        assert {len(contour) for contour in stimulus.distractors} <= {settings.distractor_length}
        assert len(stimulus.distractors) <= settings.distractors
    assert any(len(stimulus.distractors) == settings.distractors for stimulus in stimuli)


def test_consecutive_dashes_have_bounded_distance_and_turn(case):
    settings, stimuli = case
    for stimulus in stimuli:
        directions = stencils_of(settings, stimulus.margin).directions
        for contour in groups_of(stimulus):
            for dash in contour:
                assert math.dist(dash.pivot, dash.far) == pytest.approx(
                    settings.dash_length + stimulus.margin, abs=0.71
                )
                assert math.dist(dash.near, dash.far) == pytest.approx(settings.dash_length, abs=0.71)
            for last, dash in itertools.pairwise(contour):
                step = math.dist(last.pivot, dash.pivot)
                assert step == pytest.approx(settings.dash_length + 2 * stimulus.margin, abs=0.71)
                turn = math.remainder(directions[last.direction].angle - directions[dash.direction].angle, 2 * math.pi)
                assert abs(turn) < math.pi / 2 / settings.continuity


def test_second_contour_starts_at_the_seed_distance_and_the_first_off_the_frame(case):
    settings, stimuli = case
    for stimulus in stimuli:
        first, second = (contour[0].near for contour in stimulus.contours)
        assert math.dist(first, second) == pytest.approx(settings.seed_distance, abs=0.71)
        assert all(settings.seed_frame <= place < settings.size - settings.seed_frame for place in first)


def test_footprints_do_not_overlap_and_stay_off_the_padding(case):
    settings, stimuli = case
    for stimulus in stimuli[:60]:
        dashes = [
            (group, place, dash)
            for group, contour in enumerate(groups_of(stimulus))
            for place, dash in enumerate(contour)
        ]
        covered = [footprint(settings, stimulus, dash) for _, _, dash in dashes]
        for (one, first), (other, second) in itertools.combinations(zip(dashes, covered, strict=True), 2):
            neighbours = one[0] == other[0] and abs(one[1] - other[1]) == 1
            assert neighbours or not first & second
        inside = range(settings.padding, settings.size - settings.padding)
        assert all(row in inside and column in inside for pixels in covered for row, column in pixels)


def test_drawn_pixels_of_non_adjacent_dashes_are_more_than_a_margin_apart(case):
    settings, stimuli = case
    for stimulus in stimuli[:6]:
        dashes = [
            (group, place, dash)
            for group, contour in enumerate(groups_of(stimulus))
            for place, dash in enumerate(contour)
        ]
        for one, other in itertools.combinations(dashes, 2):
            if one[0] == other[0] and abs(one[1] - other[1]) == 1:
                continue
            pixels = itertools.product(picture(settings, stimulus, one[2]), picture(settings, stimulus, other[2]))
            assert min(itertools.starmap(math.dist, pixels)) > stimulus.margin


def test_footprint_lies_within_a_margin_of_the_drawn_dash_and_contains_it(case):
    settings, stimuli = case
    stimulus = stimuli[0]
    for direction in stencils_of(settings, stimulus.margin).directions:
        rows, columns = direction.picture.nonzero()
        near = pixels_of(direction.footprint, stencils_of(settings, stimulus.margin).stride)
        for row, column in zip(*near, strict=True):
            assert min(np.hypot(rows - row, columns - column)) <= stimulus.margin + 0.71
        bits = set(zip(near[0].tolist(), near[1].tolist(), strict=True))
        assert set(zip(rows.tolist(), columns.tolist(), strict=True)) <= bits


def test_image_is_the_pixelwise_maximum_of_dashes_and_discs(case):
    settings, stimuli = case
    for stimulus in stimuli[:6]:
        grey = np.zeros((settings.size, settings.size))
        contrasts = [settings.contour_contrast] * 2 + [settings.distractor_contrast] * len(stimulus.distractors)
        for contrast, contour in zip(contrasts, groups_of(stimulus), strict=True):
            for dash in contour:
                for place, covered in picture(settings, stimulus, dash).items():
                    grey[place] = max(grey[place], min(1.0, contrast * covered))
        for disc in stimulus.discs:
            for row, column in itertools.product(range(settings.size), repeat=2):
                fine = [(place + 0.5) / settings.antialias - 0.5 for place in range(settings.antialias)]
                hits = [
                    math.hypot(row + y - disc[0], column + x - disc[1]) <= settings.marker_radius
                    for y in fine
                    for x in fine
                ]
                grey[row, column] = max(grey[row, column], sum(hits) / len(hits))
        assert np.abs(stimulus.image - 255 * grey / grey.max()).max() <= 0.51


@pytest.mark.parametrize(
    ("settings", "brightest"),
    [pytest.param(LRA, (255, 191, 255), id="32-px"), pytest.param(PATHX, (255, 230, 230), id="128-px")],
)
def test_nothing_is_brighter_than_a_disc_and_contours_have_their_contrasts(settings, brightest):
    stimulus = draw_stimulus(settings, 0, 0)
    discs = {
        (row, column)
        for row, column in itertools.product(range(settings.size), repeat=2)
        if min(math.dist((row, column), disc) for disc in stimulus.discs) <= settings.marker_radius + 1
    }
    of_contours, of_distractors = (
        max(
            int(stimulus.image[place])
            for contour in group
            for dash in contour
            for place in set(picture(settings, stimulus, dash)) - discs
        )
        for group in (stimulus.contours, stimulus.distractors)
    )
    assert (int(stimulus.image[stimulus.discs[0]]), of_contours, of_distractors) == brightest
    assert int(stimulus.image[stimulus.discs[1]]) == 255


def test_free_pivots_are_those_whose_footprint_is_unoccupied():
    stencils, rng = stencils_of(SHORT, 1), np.random.default_rng(0)
    board = stencils.border
    for row, column in rng.integers(stencils.reach, stencils.reach + SHORT.size, (9, 2)).tolist():
        board |= 1 << (row * stencils.stride + column)
    for number, direction in enumerate(stencils.directions):
        found = set(map(tuple, pathfinder_stimulus._free_pivots(stencils, number, board).tolist()))
        offsets = list(zip(*(part.tolist() for part in pixels_of(direction.footprint, stencils.stride)), strict=True))
        for row, column in itertools.product(range(SHORT.size), repeat=2):
            free = all(not board >> ((row + y) * stencils.stride + column + x) & 1 for y, x in offsets)
            on_board = board >> ((row + stencils.reach) * stencils.stride + column + stencils.reach) & 1
            place = (row + stencils.reach) * stencils.stride + column + stencils.reach
            assert ((row, column) in found) == (free and not (on_board and stencils.border >> place & 1))


@pytest.mark.parametrize("continuity", [1.0, 2.0])
def test_turns_without_obstacles_follow_cosine_squared(continuity):
    free = StimulusSettings(
        size=100,
        contour_length=2,
        distractors=0,
        seed_distance=30.0,
        seed_frame=45,
        dash_length=6,
        continuity=continuity,
        margins=(2,),
    )
    directions = stencils_of(free, 2).directions
    turns = [
        math.remainder(directions[first.direction].angle - directions[second.direction].angle, 2 * math.pi)
        for number in range(400)
        for first, second in draw_stimulus(free, 0, number).contours
    ]
    # The same directions, weighted by hand.
    expected = []
    for first in directions:
        weights = {}
        for second in directions:
            angle = math.acos(max(-1.0, min(1.0, math.cos(first.angle - second.angle))))
            weights[angle] = weights.get(angle, 0.0) + math.cos(min(continuity * angle, math.pi / 2)) ** 2
        total = sum(weights.values())
        expected.append(
            (sum(w * a for a, w in weights.items()) / total, sum(w * a * a for a, w in weights.items()) / total)
        )
    mean, square = (sum(values) / len(expected) for values in zip(*expected, strict=True))
    error = math.sqrt((square - mean**2) / len(turns))
    assert abs(sum(map(abs, turns)) / len(turns) - mean) < 4 * error
    assert abs(sum(turns) / len(turns)) < 4 * math.sqrt(square / len(turns))  # left as often as right


def test_sample_does_not_depend_on_earlier_draws():
    alone = draw_stimulus(SHORT, 3, 7)
    for number in range(9):
        again = draw_stimulus(SHORT, 3, number)
        if number == 7:
            assert np.array_equal(again.image, alone.image)
            assert again[1:] == alone[1:]


def test_samples_and_seeds_differ():
    images = {draw_stimulus(SHORT, seed, number).image.tobytes() for seed in range(3) for number in range(100)}
    assert len(images) == 300


def test_output_of_a_generator_version_never_changes():
    assert pathfinder_stimulus.GENERATOR_VERSION == 1, "new version: record its hashes here"
    total = hashlib.sha256()
    for settings, count in ((LRA, 10), (SHORT, 10), (PATHX, 1)):
        for number in range(count):
            stimulus = draw_stimulus(settings, 5, number)
            total.update(stimulus.image.tobytes() + bytes([stimulus.label]))
    assert total.hexdigest() == "7afcf8cdd939f11d62fc57da7b1e05548dec363296c6393427c09bbed6ac1b5d"


def test_contours_that_cannot_fit_give_an_error_message(monkeypatch):
    monkeypatch.setattr(pathfinder_stimulus, "STARTS", 50)
    crowded = SHORT.model_copy(update={"contour_length": 60})
    with pytest.raises(
        DataError,
        match=r"two contours of 60 dashes did not fit into 24 x 24 pixels in 50 attempts \(margin [12]\); "
        r"lower contour",
    ):
        draw_stimulus(crowded, 0, 0)


def test_start_that_fits_nowhere_gives_an_error_message():
    # A dash of 20 pixels that starts in the middle leaves the image.
    long = StimulusSettings(size=28, dash_length=20, margins=(2,), seed_frame=13)
    with pytest.raises(
        DataError,
        match=r"no dash fits where the first contour may start; lower seed_frame=13, dash_length=20 or margin 2",
    ):
        draw_stimulus(long, 0, 0)


def test_distractors_stop_when_the_image_is_full():
    crowded = StimulusSettings(size=24, contour_length=3, distractors=100, distractor_length=1, seed_frame=8)
    stimulus = draw_stimulus(crowded, 0, 0)
    assert 5 < len(stimulus.distractors) < 100


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"margins": (0, 1)}, r"margins=\[0, 1\] must all be from 1 to 20"),
        ({"dash_thickness": 0.7}, r"dash_thickness=0\.7 times antialias=2 is 1\.4; it must be an integer"),
        ({"size": 12, "dash_length": 8}, r"size=12 has no room for a dash with its margins; it must be at least 14"),
        ({"seed_frame": 16}, r"seed_frame=16 leaves no pixel of size=32 for the start; it must be below 16"),
        ({"continuity": 0.5}, r"continuity"),
    ],
)
def test_invalid_settings_are_refused(change, complaint):
    with pytest.raises(SpecError, match=complaint):
        StimulusSettings(**change)
