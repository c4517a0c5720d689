"""Pictures of what happens: masks drawn on pixels, sheets, curves; each checked on its own pixels."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from beit.visualize import (
    GREEN,
    GREY,
    MOST_POINTS,
    RED,
    data_tag,
    hide_patches,
    img_tag,
    jpeg_bytes,
    line_chart,
    mark_patches,
    png_bytes,
    spread,
    strip,
    ticks,
    to_bytes,
)


def picture(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_floats_become_bytes_and_back() -> None:
    images = np.stack([picture(seed=seed) for seed in range(2)])
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    np.testing.assert_array_equal(to_bytes(floats), images)


def test_what_leaves_the_range_is_cut_and_the_rest_rounded() -> None:
    values = torch.tensor([-3.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 7.0]).view(1, 1, 1, 6)
    ours = to_bytes(values.expand(1, 3, 1, 6))
    assert ours.shape == (1, 1, 6, 3)
    assert ours[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_a_mask_is_spread_over_the_pixels_of_its_patches() -> None:
    mask = np.array([[True, False, False], [False, False, True]])
    pixels = spread(mask, (4, 9))
    assert pixels.shape == (4, 9)
    for y in range(4):
        for x in range(9):
            assert pixels[y, x] == mask[y // 2, x // 3]


def test_masked_patches_are_grey_and_the_others_untouched() -> None:
    image, mask = picture(), np.zeros((3, 4), dtype=bool)
    mask[1, 2] = True
    kept = image.copy()
    hidden = hide_patches(image, mask)
    assert hidden.dtype == np.uint8
    assert (hidden[4:8, 8:12] == GREY).all()
    outside = ~spread(mask, (12, 16))
    np.testing.assert_array_equal(hidden[outside], image[outside])
    np.testing.assert_array_equal(image, kept)


def test_a_sheet_has_a_row_a_sample_and_a_gap_around_each() -> None:
    rows = [[picture(8, 8, 3 * y + x) for x in range(3)] for y in range(2)]
    sheet = np.asarray(strip(rows, side=16, gap=4))
    assert sheet.shape == (2 * 20 + 4, 3 * 20 + 4, 3)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            tile = sheet[4 + 20 * y :, 4 + 20 * x :][:16, :16]
            np.testing.assert_array_equal(tile, image.repeat(2, axis=0).repeat(2, axis=1))
    assert (sheet[:4] == 255).all()
    assert (sheet[:, 20:24] == 255).all()


def test_rows_of_a_sheet_may_differ_in_length() -> None:
    sheet = np.asarray(strip([[picture()] * 3, [picture()]], side=10, gap=2))
    assert sheet.shape == (26, 38, 3)
    assert (sheet[14:24, 14:] == 255).all()


def test_png_keeps_every_pixel() -> None:
    image = picture()
    content = png_bytes(Image.fromarray(image))
    with Image.open(io.BytesIO(content)) as back:
        assert back.format == "PNG"
        np.testing.assert_array_equal(np.asarray(back), image)


def test_an_image_element_carries_its_picture_and_escapes_its_words() -> None:
    element = ET.fromstring(img_tag(Image.fromarray(picture()), 'a "cat" & <dog>') + "</img>")
    assert element.attrib["alt"] == 'a "cat" & <dog>'
    head, data = element.attrib["src"].split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as back:
        np.testing.assert_array_equal(np.asarray(back), picture())


# --- Curves --------------------------------------------------------------------------------------


def chart(lines: dict[str, list[tuple[float, float]]], x: str = "step", y: str = "loss") -> ET.Element:
    return ET.fromstring(line_chart(lines, x, y))


def curves(svg: ET.Element) -> list[list[tuple[float, float]]]:
    found = []
    for line in svg.iter("polyline"):
        pairs = line.attrib["points"].split()
        found.append([(float(a), float(b)) for a, b in (pair.split(",") for pair in pairs)])
    return found


def numbers(svg: ET.Element) -> list[float]:
    texts = [element.text or "" for element in svg.iter("text")]
    return [float(text) for text in texts if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text)]


def test_points_lie_where_their_numbers_are() -> None:
    """Linear in both, larger values higher, the ends on the frame."""
    points = [(0.0, 2.0), (10.0, 4.0), (40.0, 1.0)]
    ((a, b, c),) = curves(chart({"": points}))
    assert (b[0] - a[0]) / (c[0] - a[0]) == pytest.approx(0.25, abs=0.002)
    assert (a[1] - b[1]) / (c[1] - b[1]) == pytest.approx(2 / 3, abs=0.002)
    assert b[1] < a[1] < c[1]  # y grows downwards in SVG
    svg = chart({"": points})
    _, _, width, height = (float(v) for v in svg.attrib["viewBox"].split())
    assert 0 < a[0] < c[0] < width
    assert 0 < b[1] < c[1] < height


def test_axes_name_the_range_and_the_quantities() -> None:
    svg = chart({"": [(0.0, 2.0), (40.0, 6.0)]}, x="step <n>", y="loss & co")
    shown = numbers(svg)
    for value in (0, 10, 20, 30, 40, 2, 3, 4, 5, 6):
        assert value in shown
    words = [element.text for element in svg.iter("text")]
    assert "step <n>" in words
    assert "loss & co" in words
    assert svg.attrib["aria-label"] == "loss & co"


def test_numbers_of_an_axis_differ_and_are_no_powers() -> None:
    assert ticks([4.548, 4.5485, 4.549], 3) == ["4.548", "4.5485", "4.549"]
    assert ticks([947.0, 1083.5, 1220.0], 3) == ["947", "1,084", "1,220"]
    assert ticks([0.0, 25000.0, 50000.0], 4) == ["0", "25,000", "50,000"]
    assert ticks([1e-5, 2e-5, 3e-5], 3) == ["1e-05", "2e-05", "3e-05"]
    assert ticks([2.0, 2.0], 3) == ["2", "2"]


@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_names_of_curves_stand_in_the_picture_above_them_each_in_a_colour_of_its_own(count: int) -> None:
    lines = {f"layer {i}": [(0.0, float(i)), (1.0, 2.0)] for i in range(count)}
    svg = chart(lines)
    _, _, width, _ = (float(v) for v in svg.attrib["viewBox"].split())
    names = [text for text in svg.iter("text") if (text.text or "").startswith("layer ")]
    places = [(float(name.attrib["x"]), float(name.attrib["y"])) for name in names]
    assert len(set(places)) == len({name.attrib["style"] for name in names}) == count
    highest = min(y for line in curves(svg) for _, y in line)
    assert all(0 < x < width - 60 and 12 < y < highest for x, y in places)


def test_points_that_are_not_finite_are_left_out() -> None:
    wild = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (math.nan, 3.0), (4.0, 2.0), (5.0, -math.inf)]
    ours = line_chart({"": wild}, "x", "y")
    assert ours == line_chart({"": [(0.0, 1.0), (4.0, 2.0)]}, "x", "y")
    assert "nan" not in ours
    assert "inf" not in ours


@pytest.mark.parametrize("lines", [{}, {"a": []}, {"a": [(math.nan, math.nan)]}])
def test_without_points_there_are_words(lines: dict[str, list[tuple[float, float]]]) -> None:
    assert line_chart(lines, "x", "y") == "<p>no numbers yet</p>"


@pytest.mark.parametrize("points", [[(3.0, 5.0)], [(1.0, 0.0), (2.0, 0.0)], [(7.0, 1.0), (7.0, 2.0)]])
def test_one_point_and_level_lines_are_drawn(points: list[tuple[float, float]]) -> None:
    (line,) = curves(chart({"": points}))
    assert len(line) == len(points)


def test_several_curves_have_colours_and_names_of_their_own() -> None:
    lines = {"train <a>": [(0.0, 1.0), (1.0, 2.0)], "val & b": [(0.0, 2.0), (1.0, 3.0)]}
    svg = chart(lines)
    assert len(curves(svg)) == 2
    assert len({line.attrib["stroke"] for line in svg.iter("polyline")}) == 2
    words = [element.text for element in svg.iter("text")]
    assert "train <a>" in words
    assert "val & b" in words


def test_masked_patches_are_green_where_right_and_red_where_wrong() -> None:
    image = np.full((8, 8, 3), 255, np.uint8)
    mask, right = np.array([[1, 1], [0, 0]], bool), np.array([[1, 0], [1, 0]], bool)
    marked = mark_patches(image, mask, right)
    for patch, colour in ((marked[:4, :4], GREEN), (marked[:4, 4:], RED)):
        wanted = [int(0.4 * 255 + 0.6 * level) for level in colour]
        assert np.abs(patch.astype(int) - wanted).max() <= 1
    assert (marked[4:] == 255).all()


# --- Small enough for a page ---------------------------------------------------------------------


def test_a_jpeg_is_as_fine_as_its_bytes_allow() -> None:
    noise = Image.fromarray(picture(400, 400))
    smooth = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 200, 3)))
    assert len(jpeg_bytes(noise, 60_000)) <= 60_000 < len(jpeg_bytes(noise, 10**9))
    with Image.open(io.BytesIO(jpeg_bytes(smooth, 60_000))) as back:
        assert np.abs(np.asarray(back).astype(int) - np.asarray(smooth)).max() <= 3
    element = ET.fromstring(data_tag(jpeg_bytes(smooth, 60_000), "jpeg", "a") + "</img>")
    head, data = element.attrib["src"].split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as back:
        assert (back.format, back.size) == ("JPEG", (200, 200))


def test_a_long_curve_is_drawn_by_as_many_points_as_can_be_seen() -> None:
    line = [(float(x), math.sin(x / 9000)) for x in range(50_000)]
    (ours,) = curves(chart({"": line}))
    assert len(ours) == MOST_POINTS
    (ends,) = curves(chart({"": [line[0], *line[25:49_975:50], line[-1]]}))
    for one, other in ((ours[0], ends[0]), (ours[-1], ends[-1])):
        assert one == pytest.approx(other, abs=0.2)


def test_a_tile_that_is_made_smaller_is_averaged() -> None:
    stripes = np.zeros((192, 192, 3), dtype=np.uint8)
    stripes[::2] = 200
    tile = np.asarray(strip([[stripes]], side=96, gap=0))
    assert (tile == 100).all()
