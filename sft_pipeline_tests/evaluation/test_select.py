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
