"""`sft sweep`: short trainings at equal supervised-token budgets, ranked by the recipe's own rule.

grid.py      what varies: `--set` options with several values become trials
stages.py    the three stages of a trial: boundary probe, training, judgement on the validation split
plan.py      the common budget, and all trials with their data, before anything is trained
trial.py     one trial: what became of it
run.py       one trial after the other; what is there already is reused
ranking.py   gates, then ranking; what diverged or was blocked comes last, with the reason
"""
