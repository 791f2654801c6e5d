"""Which rank is lost, from the reports of all: only the rule, without sockets or clocks. Standard library only.

One loss causes other failures. If a rank is killed, the collectives of the others fail a moment later, and each of them
reports an error of its own; if a rank hangs, the others wait in silence. The rule names the cause. It never ends a run
because of a fault of the watch itself.
"""

from __future__ import annotations

from collections.abc import Sequence

# Seconds. All ranks must have ended within 30 s of a loss.
SILENT_S = 15.0  # Without a report: the node died or lost its network.
STOPPED_S = 10.0  # A process stopped by SIGSTOP: a debugger or a short Ctrl-Z takes less.
SETTLE_S = 4.0  # After one rank's error: the others may be about to report the same error, or its cause.
SUSPECT_S = 3.0  # Without a report while another rank has just failed.

AWAITED, RUNS, STOPPED = "awaited", "runs", "stopped"
WAITS, ENDED, GONE, UNWATCHED = "waits", "ended", "gone", "unwatched"
REPORTED = (RUNS, STOPPED, WAITS, ENDED, GONE, UNWATCHED)
OVER = (WAITS, ENDED, GONE, UNWATCHED)  # WAITS: it failed, and waits for the verdict on whether it is the cause.

LOST = 70  # The contract's exit code for a lost rank.
PASSED_ON = (64, 65, 74, 78)  # Exit codes of orderly errors, which the other ranks adopt.


class RankState:
    """What is known about one rank. Times are in monotonic seconds."""

    def __init__(self, rank: int, now: float) -> None:
        self.rank, self.host, self.phase, self.step = rank, "?", "start", 0
        self.state, self.code, self.why = AWAITED, 0, ""
        self.heard = self.since = now  # The last report, and the first report of the present `state`.

    def update(self, now: float, state: str, code: int, phase: str, step: int) -> None:
        """Records a report of the rank."""
        if state != self.state:
            self.since = now
        self.heard, self.state, self.code, self.phase, self.step = now, state, code, phase, step

    def excuse(self, seconds: float) -> None:
        """Moves the times on by `seconds`, for which the hub itself was suspended."""
        self.heard += seconds
        self.since += seconds

    def silent_for(self, now: float) -> float:
        """Seconds since the last report, if the rank should still report; else 0."""
        return now - self.heard if self.state in (RUNS, STOPPED) else 0.0


def find_lost(ranks: Sequence[RankState], now: float) -> RankState | None:
    """The lost rank, once it is certain which one it is; None before."""
    silent = [rank for rank in ranks if rank.silent_for(now) >= SILENT_S]
    if gone := [rank for rank in ranks if rank.state == GONE]:
        return _first(gone)
    if silent:
        return _longest_silent(silent)
    stopped = [rank for rank in ranks if rank.state == STOPPED]
    if stopped and (others := _first([rank for rank in ranks if rank.state in (RUNS, WAITS)])):
        # If every rank is stopped, somebody has suspended the job; the ranks may resume at different times.
        first = min(stopped, key=lambda rank: rank.since)
        if now - max(first.since, others.since) >= STOPPED_S:
            return first
    return _find_failed(ranks, stopped, now)


def _find_failed(ranks: Sequence[RankState], stopped: Sequence[RankState], now: float) -> RankState | None:
    """The rank whose error caused the others' errors or keeps them waiting; None if there is none yet."""
    ended = [rank for rank in ranks if rank.state == ENDED and rank.code != 0]
    waits = [rank for rank in ranks if rank.state == WAITS]
    if not any(rank.state in (RUNS, STOPPED) for rank in ranks):
        return _first(ended) if waits else None
    first = _first([*ended, *waits])
    if first is None or now - first.since < SETTLE_S:
        return None
    suspects = [rank for rank in ranks if rank.silent_for(now) >= SUSPECT_S]
    return _longest_silent(suspects) or _first(stopped) or first


def is_over(ranks: Sequence[RankState]) -> bool:
    """Whether no rank is left to wait for."""
    return all(rank.state in OVER for rank in ranks)


def describe(lost: RankState, now: float) -> str:
    """The message about a lost rank: where it ran, in which phase, what happened, and what to do."""
    who, where = f"rank {lost.rank} on {lost.host}", f"in phase {lost.phase} at step {lost.step}"
    if lost.state in (WAITS, ENDED):
        return f"{who} ended with code {lost.code} {where}: {lost.why or 'its own message says why'}"
    if lost.state == GONE:
        why = "its process was killed or crashed; the system kills processes when memory runs out"
    elif lost.state == STOPPED:
        why = f"its process has been stopped for {now - lost.since:.0f} s"
    else:
        why = f"no report for {now - lost.heard:.0f} s: is its node up and reachable?"
    return f"{who} was lost {where} ({why}); run the same command again to go on from the last checkpoint"


def exit_code(lost: RankState) -> int:
    """The exit code of the other ranks."""
    return lost.code if lost.state in (WAITS, ENDED) and lost.code in PASSED_ON else LOST


def speaker(ranks: Sequence[RankState], lost: RankState) -> int:
    """The rank that prints the message: the lowest one that still can; -1 if none can."""
    able = [rank.rank for rank in ranks if rank is not lost and rank.state in (RUNS, WAITS)]
    return min(able, default=-1)


def _first(ranks: Sequence[RankState]) -> RankState | None:
    return min(ranks, key=lambda rank: rank.since, default=None)


def _longest_silent(ranks: Sequence[RankState]) -> RankState | None:
    return min(ranks, key=lambda rank: rank.heard, default=None)
