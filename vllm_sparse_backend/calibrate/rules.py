"""Which policy each head gets: pure functions of the table.

All of them look at every candidate, so that none depends on where a search would have begun.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

from vllm_sparse_backend.calibrate.candidates import SALE_START
from vllm_sparse_backend.calibrate.table import Floats, Table

Choice = npt.NDArray[np.intp]  # [L, H], into the table's candidates

SALE_LEAST = 1e-4  # at which threshold SALE gives up and computes the head densely
BISECTIONS = 60
LEAST = 1e-12  # of an error, as a divisor
# What a nat a token weighs against relative L1, in rule loss. Any weight from 1 to 5 takes two
# thirds of the predicted divergence away, at the same density, for a tenth more relative L1.
NAT = 2.0


class Rule(StrEnum):
    """How heads are chosen for."""

    HEAD = "head"
    GLOBAL = "global"
    LOSS = "loss"
    SALE = "sale"
    MINFERENCE = "minference"


def choose(
    table: Table,
    cost: Floats,
    rule: Rule,
    budget: float,
    tail: float = np.inf,
    sensitivity: Floats | None = None,
) -> Choice:
    """A candidate for every head. ``cost`` [C, L, H] is what each would take; ``sensitivity``
    [L, H], of `sensitivity.sensitivities`, is rule loss's.

    - head: the cheapest whose relative L1 is within ``budget`` in every group, and that of its
      worst 1% of rows within ``tail``.
    - global: the cheapest of all choices whose errors, each in its worst group, have a mean within
      ``budget``, and none a tail beyond ``tail``: error is spent where it buys most.
    - loss: the same with an error that the model's prediction has a say in: the mean relative L1
      and ``NAT`` times the divergence that is predicted of all heads' errors (`divergence`), each
      head in its worst group, are together within ``budget``.
    - sale: SALE's own (arXiv 2505.24179, section 3.3): from 0.008 on the threshold is halved until
      the absolute error per row is below ``budget`` (its theta) in every group.
    - minference: MInference's (arXiv 2407.02490, section 3.2): of what takes at most ``budget`` of
      the time to keep all, the one with the least error.
    """
    error = table.error.max(1)  # [C, L, H], of the worst group
    allowed = table.tail.max(1) <= tail
    allowed[-1] = True
    if rule is Rule.HEAD:
        return _cheapest(cost, allowed & (error <= _limit(budget)))
    if rule is Rule.GLOBAL:
        return _spent_best(cost, error, allowed, _limit(budget))
    if rule is Rule.LOSS:
        assert sensitivity is not None
        of_all = sensitivity.size * divergence(table, sensitivity).max(1)  # a mean over heads again
        return _spent_best(cost, error + NAT * of_all, allowed, _limit(budget))
    if rule is Rule.SALE:
        return _halved(table, budget)
    return _least_error(cost, error, budget)


def divergence(table: Table, sensitivity: Floats) -> Floats:
    """KL divergence from the exact model's prediction that each candidate at each head would add,
    in nats a token: [C, K, L, H]. To second order, for errors of independent directions: how
    choices compare, more than how large they are."""
    return 0.5 * sensitivity * table.square


def _limit(budget: float) -> float:
    """No error at all means dense, and an error of 1, which is that of an output of zeros, any."""
    return -1.0 if budget == 0 else np.inf if budget >= 1 else budget


def _cheapest(cost: Floats, allowed: npt.NDArray[np.bool_]) -> Choice:
    allowed = allowed.copy()
    allowed[-1] = True  # dense
    return np.where(allowed, cost, np.inf).argmin(0)


def _spent_best(
    cost: Floats, error: Floats, allowed: npt.NDArray[np.bool_], budget: float
) -> Choice:
    """The minimum of cost + price * error, at the lowest price that keeps the mean within; what a
    price leaves of the budget, since heads have but so many choices, goes where it saves most."""
    if budget < 0 or np.isinf(budget):
        return _cheapest(cost, allowed & (error <= budget))

    def at(log_price: float) -> Choice:
        return _cheapest(cost + 2.0**log_price * error, allowed)

    low, high = -40.0, 40.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mean = np.take_along_axis(error, at(middle)[None], 0).mean()
        low, high = (low, middle) if mean <= budget else (middle, high)
    choice = at(high)
    while True:
        spent, taken = (np.take_along_axis(x, choice[None], 0) for x in (error, cost))
        more, left = error - spent, budget * spent.size - spent.sum()
        saves = np.where(allowed & (more <= left), (taken - cost) / np.maximum(more, LEAST), 0.0)
        if saves.max() <= 0:
            return choice
        best, *head = np.unravel_index(saves.argmax(), saves.shape)
        choice[tuple(head)] = best


def _halved(table: Table, theta: float) -> Choice:
    absolute = table.absolute.max(1)
    dense = len(table.candidates) - 1
    choice = np.full(absolute.shape[1:], dense, dtype=np.intp)
    halvings = [
        i
        for i, its in enumerate(table.candidates)
        if its.ladder == 0 and its.slope == 0 and _is_halving(its.policy.tau)  # type: ignore[union-attr]
    ]
    for i in halvings:  # ascending, so that the largest within the budget stays
        choice[absolute[i] < theta] = i
    return choice


def _is_halving(tau: float) -> bool:
    octaves = np.log2(SALE_START / tau)
    return bool(tau > SALE_LEAST and octaves > -0.01 and abs(octaves - round(octaves)) < 0.01)


def _least_error(cost: Floats, error: Floats, work: float) -> Choice:
    affordable = cost <= work
    cheapest = cost.argmin(0)
    best = np.where(affordable, error, np.inf).argmin(0)
    return np.where(affordable.any(0), best, cheapest)
