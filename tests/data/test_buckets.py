import pytest

from data.buckets import Bucket, bucket_table, merge_small, nearest_bucket


def test_the_table_holds_the_known_buckets_of_512_pixels() -> None:
    table = bucket_table(512, 64, 2.0)
    tall = [Bucket(704, 384), Bucket(640, 384), Bucket(576, 448)]
    assert table == (*tall, Bucket(512, 512), *(Bucket(b.width, b.height) for b in reversed(tall)))


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"), [(1024, 64, 2.0), (1328, 16, 3.0), (256, 32, 1.5), (64, 64, 4)]
)
def test_every_bucket_keeps_the_rules(resolution: int, step: int, aspect: float) -> None:
    table = bucket_table(resolution, step, aspect)
    assert Bucket(resolution, resolution) in table and len(set(table)) == len(table)
    for height, width in table:
        assert height % step == width % step == 0
        assert max(height, width) <= aspect * min(height, width)
        # Half a step of the shorter side is what rounding may add or take.
        assert abs(height * width - resolution**2) <= max(height, width) * step / 2
        assert Bucket(width, height) in table


@pytest.mark.parametrize(
    ("arguments", "message"), [((500, 64, 2.0), "not a multiple"), ((512, 0, 2.0), "step"), ((512, 64, 0.5), "below 1")]
)
def test_tables_that_make_no_sense_are_refused(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bucket_table(*arguments)


def test_images_go_to_the_nearest_ratio_whatever_their_size() -> None:
    table = bucket_table(512, 64, 2.0)
    assert nearest_bucket(3000, 3100, table) == (512, 512)
    assert nearest_bucket(90, 160, table) == (384, 704)
    assert nearest_bucket(4000, 1000, table) == (704, 384)


def test_small_buckets_join_the_nearest_ratio_until_none_is_small() -> None:
    square, wide, wider, tall = Bucket(8, 8), Bucket(8, 10), Bucket(8, 16), Bucket(16, 8)
    counts = {square: 100, wide: 3, wider: 4, tall: 50}
    # wide (3) is nearest to square; wider (4) then too, since wide is gone.
    assert merge_small(counts, 10) == {square: square, wide: square, wider: square, tall: tall}
    # wider joins wide, which is large enough with it.
    assert merge_small({square: 100, wide: 7, wider: 4}, 10)[wider] == wide
    assert merge_small({square: 2, tall: 1}, 10) == {square: square, tall: square}
    assert merge_small(counts, 3) == {b: b for b in counts}
