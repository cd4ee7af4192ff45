"""The stage's checks, from what was measured. Descriptions carry the numbers."""

import math
from collections.abc import Mapping, Sequence

from sft_pipeline.stages.evaluation.compare import Comparison
from sft_pipeline.stages.evaluation.config import EvaluationConfig
from sft_pipeline.stages.evaluation.select import Selection, better
from sft_pipeline.stages.stage import Check, number, table

TEST_LOSS = "test_loss"
"""The name on the test side of what is `val_loss` on the validation side."""
MAX_UNFINISHED = 0.05


def measure_of(term: str) -> str:
    """The measure on the test side that a ranking term speaks of."""
    name = term.lstrip("-")
    return TEST_LOSS if name == "val_loss" else name


def gates_passed(selection: Selection, config: EvaluationConfig, rows: int) -> Check:
    """Blocking: the winner passes every gate, measured on the validation side."""
    winner = next(r for r in selection.table if r["step"] == selection.step)
    if not config.gates:
        description = f"no gates are set; step {selection.step} was chosen: {selection.why}"
        return Check("gates_passed", True, description, {"checkpoints": table(selection.table)})
    shown = ", ".join(
        f"{name} {winner[name]:.4g}" for name in dict.fromkeys(g.split()[0] for g in config.gates)
    )
    if not rows:
        description = f"the validation side has no rows, so that no checkpoint can be judged against {', '.join(config.gates)}: raise split.validation"
    elif selection.passed:
        description = f"step {selection.step} passes {', '.join(config.gates)} with {shown}"
    else:
        description = selection.why
    return Check("gates_passed", selection.passed, description, {"checkpoints": table(selection.table)})


def improvement(comparisons: Mapping[str, Comparison], config: EvaluationConfig) -> Check:
    """Blocking: the winner is strictly better than the base on the first ranking term, on the test side."""
    term = config.rank_by[0]
    found = comparisons[measure_of(term)]
    evidence = {
        "base": number(found.base.value),
        "tuned": number(found.tuned.value),
        "difference": table(
            [
                {
                    "measure": found.name,
                    **found.to_json()["difference"],
                    "p_value": found.to_json()["p_value"],
                    "wins": found.wins,
                    "losses": found.losses,
                    "ties": found.ties,
                }
            ]
        ),
    }
    if math.isnan(found.tuned.value):
        passed, said = False, f"{found.name} cannot be measured: the test side has no rows. Raise split.test"
        evidence = {}
    else:
        passed = better(found.tuned.value, found.base.value, term)
        word = "below" if found.lower_is_better else "above"
        said = f"tuned {found.tuned.value:.4g} is {'' if passed else 'not '}{word} base {found.base.value:.4g} on {found.name}"
        said += (
            f" ({found.rows} test rows, {found.groups} groups; difference {found.difference.value:+.4g}, 95 % interval "
            f"{found.difference.low:+.4g} to {found.difference.high:+.4g}; {found.wins} better, {found.losses} worse, p = {found.p_value:.2g})"
        )
    if not config.require_improvement:
        return Check(
            "improvement", True, f"not required (evaluation.require_improvement is false): {said}", evidence
        )
    return Check("improvement", passed, said, evidence)


def selection_explained(selection: Selection) -> Check:
    """Informational: the choice in words, and whether the lowest loss would have chosen differently."""
    differs = selection.lowest_loss is not None and selection.lowest_loss != selection.step
    note = "" if differs else "; it also has the lowest val_loss" if selection.lowest_loss is not None else ""
    return Check("selection_explained", True, selection.why + note, {"checkpoints": table(selection.table)})


def replies_end(unfinished: int, generated: int, config: EvaluationConfig) -> Check:
    """A warning: replies that were cut are graded as they are, so that a limit too low costs score."""
    share = unfinished / generated if generated else 0.0
    passed = share <= MAX_UNFINISHED
    description = f"{unfinished} of {generated} test replies of the tuned model were cut at max_new_tokens {config.max_new_tokens}"
    if not passed:
        description += "; they were graded as they are. Raise evaluation.max_new_tokens, or see whether the model learned to stop"
    return Check(
        "replies_end", passed, description, {"unfinished": number(unfinished), "share": number(share)}
    )


def graded_rows(ungradable: Mapping[str, int], rows: int) -> str | None:
    """A line about expected completions that a grader cannot grade against, None where there are none."""
    found: Sequence[str] = [f"{name} {n}" for name, n in ungradable.items() if n]
    return (
        f"expected completions that a grader cannot grade against (they score 0), of {rows}: {', '.join(found)}"
        if found
        else None
    )
