import numpy as np

from training.fitting.transformer.frame import Frame, Window, draw_window, show_all, show_window


def test_a_whole_photo_lands_at_the_top_left_and_beside_it_is_nothing() -> None:
    values = np.full((28, 56), 2, np.int32)
    values[:, :28] = 1
    cells = show_all(28, 56, 56).cut_cells(values, -1)
    assert cells.shape == (14, 14)
    assert (cells[:7, :7] == 1).all()
    assert (cells[:7, 7:] == 2).all()
    assert (cells[7:] == -1).all()


def test_several_maps_are_cut_like_one() -> None:
    values = np.arange(30 * 40 * 3).reshape(30, 40, 3)
    whole = show_all(30, 40, 56)
    together = whole.cut_cells(values, 0)
    assert all((together[..., index] == whole.cut_cells(values[..., index], 0)).all() for index in range(3))


def show_quarter(whole: Frame) -> Frame:
    """The lower right quarter of the square, made as large."""
    return show_window(whole, 4, Window(top=2, left=2, side=2))


def test_a_window_of_half_the_side_shows_its_quarter_twice_as_large() -> None:
    frame = show_quarter(show_all(56, 56, 56))
    image = np.zeros((56, 56, 3), np.uint8)
    image[28:42, 28:56] = 200
    square = frame.cut_pixels(image)
    assert square.shape == (3, 56, 56)
    assert (square[:, 1:27, 1:] == 200).all()  # its rim mixes with what lies beside the window
    assert (square[:, 29:] == 0).all()
    assert frame.cut_cells(image[..., 0], 0)[:, 0].tolist() == [200] * 7 + [0] * 7


def test_features_of_a_window_are_those_of_its_patches_and_between_them_bilinear() -> None:
    maps = np.zeros((1, 4, 4, 1), np.float16)
    maps[0, 2:, 2:, 0] = [[0, 4], [0, 4]]
    part = show_quarter(show_all(56, 56, 56)).cut_maps(maps)
    assert part[0, :, :, 0].tolist() == [[0, 1, 3, 4]] * 4


def test_windows_stay_on_the_photo_and_have_half_to_all_of_the_side() -> None:
    whole = show_all(28, 56, 56)  # two of four rows of patches
    windows = [draw_window(whole, 4, np.random.default_rng(seed)) for seed in range(60)]
    drawn = {(each.top, each.left, each.side) for each in windows}
    assert drawn == {(0, 0, 2), (0, 1, 2), (0, 2, 2), (0, 0, 3), (0, 1, 3), (0, 0, 4)}


def test_a_window_of_everything_is_the_whole_photo() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    whole = show_all(40, 56, 56)
    frame = show_window(whole, 4, Window(top=0, left=0, side=4))
    assert (frame.cut_pixels(image) == whole.cut_pixels(image)).all()
    maps = np.random.default_rng(1).normal(size=(1, 4, 4, 2)).astype(np.float16)
    assert (frame.cut_maps(maps) == maps).all()
