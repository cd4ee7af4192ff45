"""The choice among checkpoints: gates first, then a lexicographic ranking; ties go to the earliest step."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Gate:
    """One condition that the winner must meet, such as `format_pass_rate >= 0.98`. A NaN meets none."""

    name: str
    symbol: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Reads `NAME >= NUMBER`; the configuration has checked the form."""
        name, symbol, bound = text.split()
        return cls(name, symbol, float(bound))

    def met(self, scores: Mapping[str, float]) -> bool:
        return _OPERATORS[self.symbol](scores[self.name], self.bound)

    def __str__(self) -> str:
        return f"{self.name} {self.symbol} {self.bound:g}"


@dataclass(frozen=True)
class Candidate:
    """One checkpoint and what it scored on the validation split: every grader's mean, and `val_loss`."""

    step: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Selection:
    """The chosen checkpoint, and the reasons.

    Attributes:
        step: The winner: the best of those which pass every gate; where none does, the best of all.
        passed: Whether the winner passes every gate.
        why: The choice in words.
        lowest_loss: The step with the lowest `val_loss`, None where no loss is known.
        table: One row for each checkpoint by step: step, the scores, `gates` ("passed" or which failed), rank
            from 1.
    """

    step: int
    passed: bool
    why: str
    lowest_loss: int | None
    table: list[dict[str, Any]]

    def to_json(self) -> list[dict[str, Any]]:
        """The table with the chosen row marked, and null for what could not be measured."""
        return [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            | {"chosen": row["step"] == self.step}
            for row in self.table
        ]


def better(a: float, b: float, term: str) -> bool:
    """Whether `a` is strictly better than `b` on a ranking term; a leading minus means lower is better."""
    return a < b if term.startswith("-") else a > b


def _sort_key(candidate: Candidate, rank_by: Sequence[str]) -> tuple[float, ...]:
    key = []
    for term in rank_by:
        value = candidate.scores[term.lstrip("-")]
        # A score that could not be measured is the worst there is.
        key.append(math.inf if math.isnan(value) else value if term.startswith("-") else -value)
    return (*key, candidate.step)


def select(candidates: Sequence[Candidate], gates: Sequence[Gate], rank_by: Sequence[str]) -> Selection:
    """Chooses a checkpoint.

    Args:
        candidates: At least one.
        rank_by: Names of scores in order of weight; "-NAME" ranks the lowest first.
    """
    ranked = sorted(candidates, key=lambda c: _sort_key(c, rank_by))
    failed = {c.step: [str(g) for g in gates if not g.met(c.scores)] for c in candidates}
    # Those which pass come before those which do not; the sort is stable.
    ranked.sort(key=lambda c: bool(failed[c.step]))
    winner = ranked[0]
    rank = {c.step: i + 1 for i, c in enumerate(ranked)}
    losses = [
        (c.scores["val_loss"], c.step)
        for c in candidates
        if not math.isnan(c.scores.get("val_loss", math.nan))
    ]
    lowest = min(losses)[1] if losses else None
    table = [
        {
            "step": c.step,
            **dict(c.scores),
            "gates": "failed: " + ", ".join(failed[c.step]) if failed[c.step] else "passed",
            "rank": rank[c.step],
        }
        for c in sorted(candidates, key=lambda c: c.step)
    ]
    why = _explanation(ranked, failed, gates, rank_by, lowest)
    return Selection(winner.step, not failed[winner.step], why, lowest, table)


def _explanation(
    ranked: Sequence[Candidate],
    failed: Mapping[int, list[str]],
    gates: Sequence[Gate],
    rank_by: Sequence[str],
    lowest: int | None,
) -> str:
    """The choice in words: the gates, what decided, and why the lowest loss was not chosen."""

    def score(candidate: Candidate, name: str) -> str:
        found = candidate.scores[name]
        return f"a {name} that could not be measured" if math.isnan(found) else f"{name} {found:.4g}"

    def differing(candidate: Candidate) -> int | None:
        """The first term on which a candidate ranks differently than the winner."""
        pairs = zip(keys[candidate.step][:-1], keys[winner.step][:-1], strict=True)
        return next((i for i, (its, best) in enumerate(pairs) if its != best), None)

    winner, names = ranked[0], [term.lstrip("-") for term in rank_by]
    keys = {c.step: _sort_key(c, rank_by) for c in ranked}  # unlike scores, equal where neither was measured
    passing = [c for c in ranked if not failed[c.step]]
    total = len(ranked)
    clauses = []
    if gates and passing:
        clauses.append(f"{len(passing)} of {total} checkpoints pass the gates ({', '.join(map(str, gates))})")
    elif gates:
        missed = [g for g in gates if not g.met(winner.scores)]
        nearest = ", ".join(f"{score(winner, g.name)} ({g} asked)" for g in missed)
        clauses.append(
            f"no checkpoint passes the gates; step {winner.step} is the best by rank, with {nearest}"
        )
    others = (passing or list(ranked))[1:]
    if not others:
        clauses.append(f"step {winner.step} is the only {'one left' if total > 1 else 'checkpoint'}")
    else:
        second = others[0]  # ties with the winner on as many terms as any other does
        at = differing(second)
        if at is None:
            tied = f"step {winner.step} ties with step {second.step} on {', '.join(names)}"
            clauses.append(f"{tied} and is the earlier one")
        else:
            best = "lowest" if rank_by[at].startswith("-") else "highest"
            among = f" of those tied on {', '.join(names[:at])}" if at else ""
            clauses.append(
                f"step {winner.step} has the {best} {score(winner, names[at])}{among}, "
                f"before step {second.step} with " + score(second, names[at]).removeprefix(f"{names[at]} ")
            )
    if lowest is not None and lowest != winner.step:
        loser = next(c for c in ranked if c.step == lowest)
        at = differing(loser)
        if failed[lowest] and not failed[winner.step]:
            reason = "fails " + ", ".join(failed[lowest])
        elif at is None:
            reason = f"ties on {', '.join(names)} and is the later one"
        else:
            reason = f"has {score(loser, names[at])} against {winner.scores[names[at]]:.4g}"
        clauses.append(f"step {lowest} has the lowest val_loss ({loser.scores['val_loss']:.4g}) but {reason}")
    return "; ".join(clauses)
