"""What scores a reply: read from a recipe, tried before training, used in evaluation.

config.py             the kinds of graders, as a recipe has them
sources.py            the files outside the store that they read
graders.py            from a configuration to a function that scores
numbers_in_text.py    numbers as people write them
trial.py              every grader run on a few rows, before anything is trained
"""
