"""Soft-cap sampling: draw pairs in proportion to the softmax of a score, and lower the score of a pair at each draw.

Source: Filter Like You Test, arXiv 2503.08805. There a pair with score s that was drawn k times has the logit s - k penalty.
The authors draw batches, without replacement in a batch, and lower the scores after it. Here the scores are lowered after every
draw. That is the same procedure with batches of one draw.

A draw at a time is not needed for that. Let an alarm of every pair ring at the rate exp(logit), each time after an exponential
waiting time. Of independent exponential times, the next alarm belongs to a pair with the probability that the softmax gives it.
So the first M alarms are M draws, and the alarms of a pair depend on no other pair.
"""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.uids import pack_column
from pipeline.errors import UserError
from pipeline.results.numbers import read_numbers
from pipeline.results.select import Selected, Shards, expect_score

PENALTY = 0.15  # of the paper's best filtered dataset at DataComp's medium scale
CHUNK = 1 << 22  # pairs whose waiting times are computed at once
FEW = 1000  # draws that are made one after the other at the end

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


class SoftCap(NamedTuple):
    """How pairs are drawn."""

    keep: float | None = None  # draws as a share of the pairs; above 1 where pairs are to be drawn several times
    draws: int | None = None  # the number of draws; one of the two has to be given
    penalty: float = PENALTY
    scale: float | None = None  # logits are this times the column; None: 1 over the column's standard deviation
    seed: int = 0


def sample(shards: Shards, by: str, how: SoftCap) -> Selected:
    """Draw pairs in proportion to the softmax of a column, with repeats. Uids, logits and waiting times are in memory.

    Args:
        shards: gives tables with `uid` and the column.
        by: the column. The metadata of its field says which end is good; by default high is. NaN is never drawn.
        how: how many, and how.

    Raises:
        UserError: the column is no score, both or none of `keep` and `draws` are given, or see `soft_cap`.
    """
    if (how.keep is None) == (how.draws is None):
        raise UserError("give either --keep, a share of the pairs, or --draws, a number")
    asked = how.draws if how.keep is None else how.keep
    if not 0 < asked < np.inf:  # type: ignore[operator]
        raise UserError(f"{asked} draws: a number above 0" if how.keep is None else f"keep {asked}: a share above 0")
    if how.scale is not None and not 0 < how.scale < np.inf:
        raise UserError(f"scale {how.scale}: a number above 0; which end of a column is good, its schema says")
    expect_score(by)
    uids, logits, low = [np.empty(0, "S16")], [np.empty(0)], False
    for _, part in shards(["uid", by]):
        numbers = read_numbers(part, by)
        uids.append(pack_column(part["uid"]))
        logits.append(np.where(numbers.there, numbers.values.astype(np.float64), np.nan))
        low = numbers.low_is_good
    ends = np.cumsum([len(part) for part in logits[1:]])
    uid, logit = np.concatenate(uids), np.concatenate(logits)
    del uids, logits
    there = ~np.isnan(logit)
    spread = float(np.nanstd(logit)) if there.any() and np.isfinite(logit[there]).all() else 1.0
    logit *= (-1 if low else 1) * (how.scale or 1 / (spread or 1.0))
    draws = how.draws if how.keep is None else round(how.keep * len(uid))
    counts = soft_cap(logit, uid, draws, how.penalty, how.seed)  # type: ignore[arg-type]
    return Selected(np.split(counts, ends[:-1]) if len(ends) else [])


def soft_cap(logits: Floats, uids: NDArray[np.bytes_], draws: int, penalty: float, seed: int) -> NDArray[np.int32]:
    """How often each pair is drawn. The random numbers of a pair are a hash of its uid, so the order has no effect.

    Args:
        logits: [N] scores in nats. A NaN is never drawn.
        uids: [N] packed. Pairs with one uid share their random numbers; where their times tie, the earlier pair is drawn.
        draws: M, how often a pair is drawn in all. It may be larger than N.
        penalty: by how much each draw lowers the logit of a pair, above 0.
        seed: of the random numbers.

    Returns:
        [N] counts whose sum is M.

    Raises:
        UserError: no pair can be drawn, a score is infinite, or the penalty is not above 0.
    """
    if not 0 < penalty < np.inf:
        raise UserError(f"penalty {penalty}: a number above 0, or a single pair could take every draw")
    if np.isinf(logits).any():
        raise UserError("the column has infinite values: a softmax of them draws nothing else")
    counts = np.zeros(len(logits), np.int32)
    there = np.flatnonzero(~np.isnan(logits))
    if draws and not len(there):
        raise UserError("the column has no numbers: no pair can be drawn")
    alarms = _Alarms(logits, uids, penalty, seed)
    times = np.empty(len(there))  # log of the time of the next alarm of each pair
    for rows in _chunks(len(there)):
        times[rows] = alarms.waits(there[rows], np.zeros(len(times[rows]), np.int32))
    left = draws
    while left > FEW:
        if left < len(there):  # the last draw is not after the `left`-th of the next alarms, so later pairs are out
            near = times <= np.partition(times, left - 1)[left - 1]
            there, times = there[near], times[near]
        made = _advance(alarms, there, times, counts, left)
        left -= made
        if not made:
            break
    _one_by_one(alarms, there, times, counts, left)
    return counts


class _Alarms:
    """The waiting times of every pair."""

    def __init__(self, logits: Floats, uids: NDArray[np.bytes_], penalty: float, seed: int):
        self.logits, self.words, self.penalty = logits, uids.view(">u8").reshape(-1, 2), penalty
        self.seed = _mixed(np.array([seed], np.uint64))

    def waits(self, pairs: NDArray[np.int64], drawn: NDArray[np.int32]) -> Floats:
        """Log of the time from alarm number `drawn` of some pairs to their next."""
        word = _mixed(self.words[pairs, 0].astype(np.uint64) ^ self.seed)
        word = _mixed(word ^ self.words[pairs, 1].astype(np.uint64))
        word = _mixed(word + drawn.astype(np.uint64))
        uniform = ((word >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return np.log(-np.log(uniform)) - (self.logits[pairs] - self.penalty * drawn)

    def following(self, pairs: NDArray[np.int64], drawn: NDArray[np.int32], times: Floats) -> Floats:
        """Log of the time of the next alarm, given that of alarm number `drawn`."""
        return np.logaddexp(times, self.waits(pairs, drawn))


def _advance(alarms: _Alarms, there: NDArray[np.int64], times: Floats, counts: NDArray[np.int32], left: int) -> int:
    """Make all draws up to some time, in place, and return how many they are: at most `left`; 0 if the first ones tie."""
    among = min(left, len(times)) // 2
    while among:
        horizon = np.partition(times, among - 1)[among - 1]
        rows = np.flatnonzero(times <= horizon)
        before, made = times[rows].copy(), np.zeros(len(rows), np.int32)
        active = np.arange(len(rows))
        total = 0
        while len(active) and total + len(active) <= left:
            total += len(active)
            made[active] += 1
            for chunk in _chunks(len(active)):
                at = rows[active[chunk]]
                times[at] = alarms.following(there[at], counts[there[at]] + made[active[chunk]], times[at])
            active = active[times[rows[active]] <= horizon]
        if not len(active):
            counts[there[rows]] += made
            return total
        times[rows] = before  # more alarms than draws that are left: an earlier time
        among //= 2
    return 0


def _one_by_one(alarms: _Alarms, there: NDArray[np.int64], times: Floats, counts: NDArray[np.int32], left: int) -> None:
    """Make the last draws, in place."""
    if left < len(there):
        near = times <= np.partition(times, left - 1)[left - 1] if left else np.zeros(len(times), bool)
        there, times = there[near], times[near]
    waiting = list(zip(times.tolist(), there.tolist(), strict=True))
    heapq.heapify(waiting)
    for _ in range(left):
        time, pair = waiting[0]
        counts[pair] += 1
        at = np.array([pair])
        heapq.heapreplace(waiting, (alarms.following(at, counts[at], np.array([time])).item(), pair))


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def _mixed(words: Words) -> Words:
    """Each word as another one that looks random: the output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
