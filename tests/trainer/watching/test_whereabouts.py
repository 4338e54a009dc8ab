from dataclasses import replace

from trainer.watching.whereabouts import Board, Position, describe, mismatch

AT = Position(0, step=7, stage="targets", called_step=7, no_grad_calls=2, graded_calls=0, idle_s=1.0)


def test_ranks_that_wait_for_a_slow_one_do_not_differ() -> None:
    """The slow one has begun fewer calls, is in an earlier stage, or in an earlier step."""
    ahead = replace(AT, rank=1, stage="graded pass", graded_calls=1)
    assert mismatch([AT, replace(AT, rank=1, no_grad_calls=1), ahead]) == ""
    next_step = replace(AT, rank=1, step=8, stage="data", graded_calls=1)
    assert mismatch([replace(AT, stage="optimizer step", graded_calls=1), next_step]) == ""
    assert mismatch([]) == ""


def test_more_calls_than_a_rank_that_is_through_are_a_mismatch() -> None:
    through = replace(AT, rank=3, stage="graded pass", no_grad_calls=1, graded_calls=1)
    assert "step 7: rank 0 has begun 2 no-grad calls, rank 3 made 1" in mismatch([through, AT])
    over = replace(AT, rank=3, step=8, stage="", graded_calls=1)
    graded = replace(AT, stage="graded pass", graded_calls=2)
    assert "rank 0 has begun 2 graded calls, rank 3 made 1" in mismatch([over, graded])


def test_ranks_at_one_place_are_one_line_and_silent_ones_are_named() -> None:
    many = [replace(AT, rank=rank, idle_s=float(rank)) for rank in (0, 1, 2, 5)]
    lines = describe(
        5 + 2, [replace(AT, rank=6, stage="encode", no_grad_calls=0)], [*many, replace(AT, rank=3, stage="data")]
    )
    assert lines == [
        "rank 3: in stage 'data' of step 7, 2 no-grad and 0 graded network calls of step 7 begun, no progress for 1 s",
        "ranks 0-2, 5: in stage 'targets' of step 7, 2 no-grad and 0 graded network calls of step 7 begun, no progress "
        "for 5 s",
        "rank 4 is silent (never seen): stopped, dead, or its machine is out of reach",
        "rank 6 is silent (last seen in stage 'encode' of step 7, 0 no-grad and 0 graded network calls of step 7 begun): "
        "stopped, dead, or its machine is out of reach",
    ]
    assert len(describe(1000, [], [])) == 13


def test_the_first_alarm_stays() -> None:
    board = Board(0, 1)
    assert board.alarm() == ""
    board.raise_alarm("first")
    board.raise_alarm("second")
    assert board.alarm() == "first"
    board.publish(AT)
    assert board.positions() == [AT] and board.reports() == []
