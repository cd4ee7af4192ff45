"""`sft sweep`: short trainings at equal supervised-token budgets, ranked by the recipe's own rule.

grid.py      what varies: `--set` options with several values become points
budget.py    the common budget, and how many updates of its own plan come nearest to it for each point
stages.py    the three stages of a trial: boundary probe, training, judgement on the validation side
plan.py      all points with their data and budgets, before anything is trained
trial.py     one point: what became of it
run.py       one point after the other; what is there already is reused
ranking.py   gates, then ranking; what diverged or was blocked comes last, with the reason
pictures.py  the loss curves, and the measures over what varies
"""
