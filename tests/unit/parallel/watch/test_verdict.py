"""Who is lost, by the rule alone: every case that real processes would take minutes to play."""

from __future__ import annotations

import pytest

from sfa_dist.parallel.watch.verdict import (
    ENDED,
    GONE,
    RUNS,
    SETTLE_S,
    SILENT_S,
    STOPPED,
    STOPPED_S,
    SUSPECT_S,
    UNWATCHED,
    WAITS,
    RankState,
    describe,
    exit_code,
    find_lost,
    is_over,
    speaker,
)

START = 1000.0


def seats(*states: str | tuple[str, int], since: float = START) -> list[RankState]:
    """One seat a rank, heard at `since`; a state may come with an exit code."""
    out = []
    for rank, state in enumerate(states):
        name, code = (state, 70 if state == WAITS else 0) if isinstance(state, str) else state
        seat = RankState(rank, START)
        seat.host = f"node{rank}"
        seat.update(since, RUNS, 0, "forward", 119)
        seat.update(since, name, code, "forward", 120)
        out.append(seat)
    return out


def lost(them: list[RankState], now: float) -> int | None:
    found = find_lost(them, now)
    return None if found is None else found.rank


def keep_up(them: list[RankState], now: float, *ranks: int) -> None:
    """These ranks have just been heard."""
    for rank in ranks:
        seat = them[rank]
        seat.update(now, seat.state, seat.code, seat.phase, seat.step)


def test_nobody_is_lost_while_all_run() -> None:
    assert lost(seats(RUNS, RUNS), START) is None


def test_a_rank_that_was_never_heard_is_not_silent() -> None:
    assert find_lost([RankState(0, START), RankState(1, START)], START + 1000) is None


def test_a_process_that_ended_without_a_word_is_lost_at_once() -> None:
    assert lost(seats(RUNS, GONE, RUNS), START) == 1


def test_the_errors_that_a_loss_brings_with_it_do_not_hide_it() -> None:
    them = seats(WAITS, RUNS, WAITS)
    them[1].update(START + 0.5, GONE, 0, "forward", 120)
    assert lost(them, START + 0.5) == 1


def test_of_two_that_are_gone_the_first_is_named() -> None:
    them = seats(GONE, GONE)
    them[0].since = START + 1
    assert lost(them, START + 1) == 1


def test_silence_is_a_loss_only_after_its_limit() -> None:
    them = seats(RUNS, RUNS)
    keep_up(them, START + SILENT_S, 0)
    assert lost(them, START + SILENT_S - 0.1) is None
    assert lost(them, START + SILENT_S) == 1


def test_who_has_ended_or_is_not_watched_may_be_silent() -> None:
    them = seats(RUNS, (ENDED, 0), UNWATCHED)
    keep_up(them, START + 500, 0)
    assert lost(them, START + 500) is None


def test_a_hub_that_was_away_itself_excuses_the_silence() -> None:
    them = seats(RUNS, RUNS)
    for seat in them:
        seat.excuse(100.0)
    assert lost(them, START + 100) is None


def test_a_stopped_rank_is_lost_when_another_waits_for_it_long_enough() -> None:
    them = seats(RUNS, STOPPED)
    keep_up(them, START + STOPPED_S, 0, 1)
    assert lost(them, START + STOPPED_S - 0.1) is None
    assert lost(them, START + STOPPED_S) == 1


def test_a_suspended_job_may_come_back_one_by_one() -> None:
    them = seats(STOPPED, STOPPED)
    keep_up(them, START + 600, 0, 1)
    assert lost(them, START + 600) is None
    them[0].update(START + 600, RUNS, 0, "forward", 120)
    assert lost(them, START + 601) is None
    keep_up(them, START + 600 + STOPPED_S, 0, 1)
    assert lost(them, START + 600 + STOPPED_S) == 1


def test_an_error_of_one_rank_is_told_once_the_others_had_time_to_report_the_same() -> None:
    them = seats(RUNS, (ENDED, 65))
    keep_up(them, START + SETTLE_S, 0)
    assert lost(them, START + SETTLE_S - 0.1) is None
    assert lost(them, START + SETTLE_S) == 1


def test_an_error_beside_a_rank_that_has_just_fallen_silent_is_not_the_cause() -> None:
    them = seats(WAITS, RUNS, RUNS)
    keep_up(them, START + SETTLE_S, 2)
    assert SUSPECT_S <= SETTLE_S
    assert lost(them, START + SETTLE_S) == 1


def test_an_error_beside_a_stopped_rank_is_not_the_cause() -> None:
    them = seats(WAITS, STOPPED)
    keep_up(them, START + SETTLE_S, 1)
    assert lost(them, START + SETTLE_S) == 1


def test_who_waits_is_told_of_an_orderly_error_at_once() -> None:
    them = seats(WAITS, (ENDED, 65))
    assert lost(them, START) == 1
    assert exit_code(them[1]) == 65


@pytest.mark.parametrize(
    "states",
    [
        (WAITS, WAITS),
        ((ENDED, 0), (ENDED, 0)),
        ((ENDED, 75), (ENDED, 75)),
        ((ENDED, 78), (ENDED, 78)),
        ((ENDED, 0), UNWATCHED),
    ],
)
def test_a_common_end_is_no_loss(states: tuple[str | tuple[str, int], ...]) -> None:
    them = seats(*states)
    assert lost(them, START + 1000) is None
    assert is_over(them)


@pytest.mark.parametrize(("code", "others"), [(64, 64), (65, 65), (74, 74), (78, 78), (70, 70), (75, 70), (1, 70)])
def test_the_others_end_with_an_orderly_code_or_70(code: int, others: int) -> None:
    assert exit_code(seats((ENDED, code))[0]) == others


def test_a_lost_rank_is_70() -> None:
    assert exit_code(seats(GONE)[0]) == 70


@pytest.mark.parametrize(
    ("states", "who", "says"),
    [((RUNS, GONE), 1, 0), ((GONE, RUNS), 0, 1), ((GONE, STOPPED, WAITS), 0, 2), ((GONE, (ENDED, 78)), 0, -1)],
)
def test_the_lowest_rank_that_can_speaks(states: tuple[str | tuple[str, int], ...], who: int, says: int) -> None:
    them = seats(*states)
    assert speaker(them, them[who]) == says


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (GONE, "rank 3 on node3 was lost in phase forward at step 120 (its process was killed"),
        (STOPPED, "rank 3 on node3 was lost in phase forward at step 120 (its process has been stopped for 11 s)"),
        (RUNS, "rank 3 on node3 was lost in phase forward at step 120 (no report for 11 s"),
        ((ENDED, 65), "rank 3 on node3 ended with code 65 in phase forward at step 120"),
    ],
)
def test_says_who_where_and_what(state: str | tuple[str, int], text: str) -> None:
    assert describe(seats(RUNS, RUNS, RUNS, state)[3], START + 11).startswith(text)
