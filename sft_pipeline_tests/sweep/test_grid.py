"""`--set` options as a grid."""

import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.sweep.grid import label_of, parse_grid, recipe_lines, split_values, values_of


def test_values_are_cut_at_commas_outside_brackets_and_quotes() -> None:
    assert split_values("1e-5, 5e-5,1e-4") == ["1e-5", "5e-5", "1e-4"]
    assert split_values("[q_proj, v_proj],all-linear") == ["[q_proj, v_proj]", "all-linear"]
    assert split_values("{r: 8, alpha: [1, 2]},'a,b'") == ["{r: 8, alpha: [1, 2]}", "'a,b'"]


def test_several_sets_make_a_grid_and_a_single_value_is_common() -> None:
    grid = parse_grid(["training.learning_rate=1e-5,1e-4", "training.epochs=3", "model.lora.r=8,16"])
    assert grid.common == ("training.epochs=3",)
    assert [list(values_of(p).values()) for p in grid.trials()] == [
        [1e-5, 8],
        [1e-5, 16],
        [1e-4, 8],
        [1e-4, 16],
    ]
    assert label_of(values_of(grid.trials()[1])) == "learning_rate 1e-05, r 16"


def test_the_winner_is_a_line_of_the_recipe() -> None:
    values = {"training.learning_rate": 5e-5, "training.warmup": 0.1, "model.lora.target_modules": ["q_proj"]}
    assert recipe_lines(values) == [
        "training: {learning_rate: 5.0e-05, warmup: 0.1}",
        "model: {lora: {target_modules: [q_proj]}}",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to sweep"),
        (["training.learning_rate=1e-4"], "nothing to sweep"),
        (["training.learning_rate"], "a.b=value"),
        (["training.learning_rate=1e-4,,1e-5"], "empty"),
        (["training.learning_rate=1e-4,0.0001"], "given twice"),
        (["training.learning_rate=1,2", "training.learning_rate=3,4"], "given twice"),
        (["model.lora.target_modules=[a,b"], "not valid YAML"),
        (["training.max_steps=10,20"], "--updates"),
        (["training.early_stopping=null"], "sets training.early_stopping itself"),
        (["evaluation.gates=[],[x]"], "evaluation cannot vary"),
        (["dataset=a,b"], "dataset cannot vary"),
    ],
)
def test_what_cannot_be_swept_is_named(options: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_grid(options)
