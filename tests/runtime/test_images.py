"""The grid of images."""

import pytest
from PIL import Image

from ditq_runtime.cli.images import grid


def _tile(mode, colour, size=(3, 2)):
    return Image.new(mode, size, colour)


def test_a_grid_row_by_row_on_grey():
    sheet = grid([_tile("L", value) for value in (0, 50, 255)], columns=2, scale=2, gap=1)
    # two columns of 6 and a gap of 1; two rows of 4 and a gap of 1
    assert (sheet.mode, sheet.size) == ("L", (13, 9))
    expected = [[0] * 6 + [128] + [50] * 6] * 4 + [[128] * 13] + [[255] * 6 + [128] * 7] * 4
    assert [[sheet.getpixel((x, y)) for x in range(13)] for y in range(9)] == expected


def test_enlargement_is_nearest_neighbour():
    image = Image.new("L", (2, 1))
    image.putpixel((1, 0), 200)
    sheet = grid([image], columns=1, scale=3)
    assert [sheet.getpixel((x, 2)) for x in range(6)] == [0] * 3 + [200] * 3


@pytest.mark.parametrize(
    ("mode", "colour", "shown", "pixel"),
    [
        ("L", 9, "L", 9),
        ("RGB", (1, 2, 3), "RGB", (1, 2, 3)),
        ("RGBA", (1, 2, 3, 255), "RGB", (1, 2, 3)),
        ("1", 1, "RGB", (255, 255, 255)),
    ],
)
def test_modes(mode, colour, shown, pixel):
    sheet = grid([_tile(mode, colour)] * 3, columns=2)
    assert sheet.mode == shown
    assert sheet.getpixel((0, 0)) == pixel
    assert sheet.getpixel((5, 3)) == (128 if shown == "L" else (128, 128, 128))


def test_fewer_images_than_columns_still_make_whole_rows():
    assert grid([_tile("L", 0)], columns=4, gap=2).size == (4 * 3 + 3 * 2, 2)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        grid([], columns=1)
