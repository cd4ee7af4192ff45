import math

from hypothesis import given
from hypothesis import strategies as st

from sft_pipeline.stages.evaluation.select import Candidate, Gate, select

FIELD = [
    Candidate(200, {"val_loss": 1.91, "policy": 0.93, "format": 0.99}),
    Candidate(400, {"val_loss": 1.77, "policy": 0.91, "format": 1.00}),
    Candidate(600, {"val_loss": 1.79, "policy": 0.97, "format": 0.98}),
]
GATES = [Gate.parse("format >= 0.98")]
RANK = ["policy", "-val_loss"]


def test_worked_example_step_600_wins_though_400_has_the_lowest_loss():
    found = select(FIELD, GATES, RANK)
    assert found.step == 600 and found.passed and found.lowest_loss == 400
    assert [r["rank"] for r in found.table] == [2, 3, 1]
    assert "step 600 has the highest policy 0.97, before step 200 with 0.93" in found.why
    assert "step 400 has the lowest val_loss (1.77) but has policy 0.91 against 0.97" in found.why


def test_a_gate_comes_before_rank():
    found = select(FIELD, [Gate.parse("format >= 0.99")], RANK)
    assert found.step == 200 and found.passed
    assert found.table[2]["gates"] == "failed: format >= 0.99"


def test_no_checkpoint_passes_the_best_by_rank_is_named_but_not_passed():
    found = select(FIELD, [Gate.parse("format > 1")], RANK)
    assert found.step == 600 and not found.passed
    assert (
        "no checkpoint passes the gates; step 600 is the best by rank, with format 0.98 (format > 1 asked)"
        in found.why
    )


def test_ties_go_to_the_earliest_step():
    same = {"val_loss": 1.0, "policy": 0.5}
    found = select([Candidate(9, same), Candidate(3, same), Candidate(6, same)], [], RANK)
    assert found.step == 3 and "ties with step 6" in found.why


def test_the_second_term_decides_ties_on_the_first():
    found = select(
        [Candidate(1, {"val_loss": 2.0, "policy": 0.5}), Candidate(2, {"val_loss": 1.0, "policy": 0.5})],
        [],
        RANK,
    )
    assert found.step == 2 and "lowest val_loss 1 of those tied on policy, before step 1 with 2" in found.why


def test_a_score_that_could_not_be_measured_is_the_worst_and_meets_no_gate():
    field = [Candidate(1, {"val_loss": math.nan}), Candidate(2, {"val_loss": 5.0})]
    assert select(field, [], ["-val_loss"]).step == 2
    assert not Gate.parse("val_loss <= 9").met({"val_loss": math.nan})


def three_terms(*scores):
    """Checkpoints 1, 2, ... with these (policy, format, other, val_loss)."""
    names = ("policy", "format", "other", "val_loss")
    field = [Candidate(i, dict(zip(names, values, strict=True))) for i, values in enumerate(scores, 1)]
    return select(field, [], ["policy", "format", "other"])


def test_the_term_on_which_the_lowest_loss_differs_is_named():
    found = three_terms((0.5, 0.9, 0.7, 1.0), (0.5, 0.9, 0.8, 2.0), (0.5, 0.2, 0.9, 3.0))
    assert found.step == 2 and found.lowest_loss == 1
    assert "step 2 has the highest other 0.8 of those tied on policy, format, before step 1 with" in found.why
    assert "step 1 has the lowest val_loss (1) but has other 0.7 against 0.8" in found.why
    found = three_terms((0.5, 0.9, 0.7, 2.0), (0.5, 0.9, 0.7, 1.0))
    assert "step 2 has the lowest val_loss (1) but ties on policy, format, other and is" in found.why


def test_scores_that_could_not_be_measured_tie_and_are_called_so():
    found = three_terms((math.nan, 0.3, 0.7, 2.0), (math.nan, 0.4, 0.7, 1.0))
    assert "step 2 has the highest format 0.4 of those tied on policy, before step 1 with 0.3" in found.why
    found = three_terms((0.5, 0.3, 0.7, math.nan), (0.5, math.nan, 0.7, 1.0))
    assert "before step 2 with a format that could not be measured" in found.why
    assert "has a format that could not be measured against 0.3" in found.why
    field = [Candidate(1, {"val_loss": math.nan}), Candidate(2, {"val_loss": math.nan})]
    found = select(field, [Gate.parse("val_loss < 1")], ["-val_loss"])
    assert "with a val_loss that could not be measured (val_loss < 1 asked)" in found.why
    assert "step 1 ties with step 2 on val_loss and is the earlier one" in found.why
    assert "nan" not in found.why


def test_a_single_checkpoint():
    found = select(FIELD[:1], GATES, RANK)
    assert found.step == 200 and "only checkpoint" in found.why


scores = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8)


@given(scores, st.randoms())
def test_no_passing_checkpoint_is_better_than_the_winner(values, random):
    field = [
        Candidate(i, {"policy": a, "format": f, "val_loss": float(v)}) for i, (a, f, v) in enumerate(values)
    ]
    shuffled = list(field)
    random.shuffle(shuffled)
    gate = Gate.parse("format >= 2")
    found = select(shuffled, [gate], RANK)
    assert found == select(field, [gate], RANK)
    passing = [c for c in field if gate.met(c.scores)]
    assert found.passed == bool(passing)
    winner = field[found.step]
    for other in passing or field:
        assert (-winner.scores["policy"], winner.scores["val_loss"], winner.step) <= (
            -other.scores["policy"],
            other.scores["val_loss"],
            other.step,
        )
