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


def find_lost(rank_states: Sequence[RankState], now: float) -> RankState | None:
    """The lost rank, once it is certain which one it is; None before."""
    silent = [rank_state for rank_state in rank_states if rank_state.silent_for(now) >= SILENT_S]
    if gone := [rank_state for rank_state in rank_states if rank_state.state == GONE]:
        return _first(gone)
    if silent:
        return _longest_silent(silent)
    stopped = [rank_state for rank_state in rank_states if rank_state.state == STOPPED]
    if stopped and (others := _first([rank_state for rank_state in rank_states if rank_state.state in (RUNS, WAITS)])):
        # If every rank is stopped, somebody has suspended the job; the ranks may resume at different times.
        first = min(stopped, key=lambda rank_state: rank_state.since)
        if now - max(first.since, others.since) >= STOPPED_S:
            return first
    return _find_failed(rank_states, stopped, now)


def _find_failed(rank_states: Sequence[RankState], stopped: Sequence[RankState], now: float) -> RankState | None:
    """The rank whose error caused the others' errors or keeps them waiting; None if there is none yet."""
    ended = [rank_state for rank_state in rank_states if rank_state.state == ENDED and rank_state.code != 0]
    waits = [rank_state for rank_state in rank_states if rank_state.state == WAITS]
    if not any(rank_state.state in (RUNS, STOPPED) for rank_state in rank_states):
        return _first(ended) if waits else None
    first = _first([*ended, *waits])
    if first is None or now - first.since < SETTLE_S:
        return None
    suspects = [rank_state for rank_state in rank_states if rank_state.silent_for(now) >= SUSPECT_S]
    return _longest_silent(suspects) or _first(stopped) or first


def is_over(rank_states: Sequence[RankState]) -> bool:
    """Whether no rank is left to wait for."""
    return all(rank_state.state in OVER for rank_state in rank_states)


def describe(rank_state: RankState, now: float) -> str:
    """The message about a lost rank: where it ran, in which phase, what happened, and what to do."""
    who, where = (
        f"rank {rank_state.rank} on {rank_state.host}",
        f"in phase {rank_state.phase} at step {rank_state.step}",
    )
    if rank_state.state in (WAITS, ENDED):
        return f"{who} ended with code {rank_state.code} {where}: {rank_state.why or 'its own message says why'}"
    if rank_state.state == GONE:
        why = "its process was killed or crashed; where memory is short, the system kills too"
    elif rank_state.state == STOPPED:
        why = f"its process has been stopped for {now - rank_state.since:.0f} s"
    else:
        why = f"nothing was heard of it for {now - rank_state.heard:.0f} s: is its node up, and reachable?"
    return f"{who} was lost {where} ({why}); run the same command again to go on from the last checkpoint"


def exit_code(rank_state: RankState) -> int:
    """The exit code of the other ranks."""
    return rank_state.code if rank_state.state in (WAITS, ENDED) and rank_state.code in PASSED_ON else LOST


def speaker(rank_states: Sequence[RankState], lost: RankState) -> int:
    """The rank that prints the message: the lowest one that still can; -1 if none can."""
    able = [
        rank_state.rank for rank_state in rank_states if rank_state is not lost and rank_state.state in (RUNS, WAITS)
    ]
    return min(able, default=-1)


def _first(rank_states: Sequence[RankState]) -> RankState | None:
    return min(rank_states, key=lambda rank_state: rank_state.since, default=None)


def _longest_silent(rank_states: Sequence[RankState]) -> RankState | None:
    return min(rank_states, key=lambda rank_state: rank_state.heard, default=None)
