"""evaluation on real tiny models: full fine-tuning that learns, and adapters that differ."""

import json
import math

import pyarrow.parquet as pq
import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.evaluation.build import build, judged_is_trained
from sft_pipeline.stages.evaluation.config import EvaluationStageConfig
from sft_pipeline.store import Store
from sft_pipeline.training.config import ModelConfig
from sft_pipeline_tests.evaluation import world as w

SCHEMA = {"type": "object", "required": ["decision"]}
GRADERS = [
    {"name": "format_pass_rate", "kind": "json_schema", "schema": SCHEMA},
    {"name": "policy_pass_rate", "kind": "json_fields", "fields": ["decision"]},
]
FULL = {"base": "base", "parameterization": "full"}
LORA = {"base": "base", "parameterization": "lora", "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}


class RecordingReporter(Reporter):
    def __init__(self):
        self.lines, self.numbers, self.bars, self.sampled = [], {}, set(), []

    def log(self, message, level="info"):
        self.lines.append(message)

    def progress(self, name, done, total, unit):
        assert done <= total
        self.bars.add(name)

    def metrics(self, values, step):
        self.numbers.setdefault(step, {}).update(values)

    def samples(self, rows, step):
        self.sampled += rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation_project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_PROJECT_ROOT", str(root))
        patch.setenv("SFT_HOME", str(root / "home"))
        w.write_base(root / "base")
        yield w.World(root, Store(root / "home"))


@pytest.fixture(scope="module")
def rows(project):
    split = w.dataset(
        project, {"train": w.rows_of(0, 48), "validation": w.rows_of(48, 18), "test": w.rows_of(66, 24)}
    )
    return w.tokenized(project, split["grouped_split"])


@pytest.fixture(scope="module")
def learned(project, rows):
    return w.checkpoints(project, rows, ModelConfig(**FULL), {10: 10, 60: 60})


def config(model=FULL, **evaluation):
    return EvaluationStageConfig.model_validate(
        {
            "model": model,
            "evaluation": {
                "graders": GRADERS,
                "rank_by": ["policy_pass_rate", "-val_loss"],
                "max_new_tokens": 16,
                **evaluation,
            },
        }
    )


def run(project, rows, trained, settings, report=None):
    built, out = project.build(
        build, "evaluation", settings, {"tokenized_rows": rows, "trained_checkpoints": trained}, report
    )
    return built, json.loads((out / "evaluation.json").read_text()), out


@pytest.fixture(scope="module")
def evaluated(project, rows, learned):
    heard = RecordingReporter()
    return *run(project, rows, learned, config(gates=["format_pass_rate >= 0.9"]), heard), heard


def checks(built):
    return {c.name: c for c in built.checks}


def test_the_learned_checkpoint_is_chosen_and_beats_the_base(evaluated):
    built, found, _, heard = evaluated
    assert found["chosen_step"] == 60 and found["gates_passed"]
    assert found["base"]["policy_pass_rate"] == 0 and found["tuned"]["policy_pass_rate"] > 0.6
    assert found["difference"]["policy_pass_rate"] == pytest.approx(found["tuned"]["policy_pass_rate"])
    assert found["tuned"]["test_loss"] < found["base"]["test_loss"]
    assert [c["step"] for c in found["checkpoints"]] == [10, 60]
    assert found["sides"]["test"] == {
        "rows": 24,
        "groups": 12,
        "generated": 24,
        "ungradable": {"format_pass_rate": 0, "policy_pass_rate": 0},
    }
    assert all(c.passed for c in built.checks)
    assert (
        "tuned" in checks(built)["improvement"].description
        and "is above base 0 on policy_pass_rate" in checks(built)["improvement"].description
    )
    assert heard.numbers[60]["validation/policy_pass_rate"] == pytest.approx(
        found["checkpoints"][1]["policy_pass_rate"], abs=1e-6
    )
    assert {"evaluating step 10", "evaluating step 60", "test split, base"} <= heard.bars and heard.sampled[
        0
    ]["base_reply"] is not None


def test_every_row_stays_in_the_denominator_and_cut_replies_are_counted(evaluated):
    built, found, out, _ = evaluated
    samples = pq.read_table(out / "samples.parquet").to_pylist()
    assert len(samples) == 2 * 18 + 2 * 24
    base = [s for s in samples if s["model"] == "base"]
    assert [s["side"] for s in base] == ["test"] * 24 and all(s["step"] is None for s in base)
    assert (
        built.counts["unfinished_base"]
        == sum(not s["finished"] for s in base)
        == found["unfinished"]["base"]
        > 0
    )
    tuned = [s for s in samples if s["side"] == "test" and s["step"] == 60]
    assert sum(s["policy_pass_rate"] for s in tuned) / 24 == pytest.approx(
        found["tuned"]["policy_pass_rate"], abs=1e-6
    )
    assert [s["row_id"] for s in tuned] == [s["row_id"] for s in base]
    losses = pq.read_table(out / "test_losses.parquet").to_pydict()
    assert losses["row_id"] == [s["row_id"] for s in tuned]
    for model in ("base", "tuned"):
        mean = sum(losses[model]) / sum(losses["weight"])
        assert mean == pytest.approx(found[model]["test_loss"], abs=1e-6)
    right = next(s for s in tuned if s["policy_pass_rate"] == 1)
    assert right["reply"] == right["expected"] and right["prompt"].startswith("user\nMay I")


def test_val_loss_is_sum_over_tokens_not_a_mean_of_means(project, rows, learned, evaluated):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(learned.file("checkpoint-60"))
    total = count = 0
    for row in pq.read_table(rows.parts("validation")[0]).to_pylist():
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total, count = total - float(logits[position, label]), count + 1
    assert evaluated[1]["checkpoints"][1]["val_loss"] == pytest.approx(total / count, abs=1e-4)
    assert evaluated[1]["checkpoints"][1]["supervised_tokens"] == count


def test_built_twice_the_files_are_the_same(project, rows, learned, evaluated):
    _, _, again = run(project, rows, learned, config(gates=["format_pass_rate >= 0.9"]))
    for name in ("evaluation.json", "samples.parquet"):
        assert (again / name).read_bytes() == (evaluated[2] / name).read_bytes()


def test_max_rows_takes_the_same_rows_for_every_checkpoint(project, rows, learned):
    built, found, out = run(project, rows, learned, config(max_rows=5, require_improvement=False))
    samples = pq.read_table(out / "samples.parquet").to_pylist()
    by_model = {
        m: [s["row_id"] for s in samples if s["model"] == m and s["side"] == "validation"]
        for m in ("checkpoint-10", "checkpoint-60")
    }
    assert by_model["checkpoint-10"] == by_model["checkpoint-60"] and len(by_model["checkpoint-10"]) == 5
    assert found["sides"]["validation"]["rows"] == 18 and found["sides"]["validation"]["generated"] == 5
    assert built.counts["validation_generated"] == 5


def test_a_final_message_of_tool_calls_alone_is_graded_by_the_rendered_turn(project, learned, tmp_path):
    calls = [{"function": {"name": "open"}}]
    template = tmp_path / "tools.jinja"
    rendered = (
        "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls | tojson }}</call>{% endif %}<|im_end|>"
    )
    template.write_text(w.TEMPLATE.replace("{{ m.content }}<|im_end|>{% endgen", rendered + "{% endgen"))
    splits = {"train": w.rows_of(100, 4), "validation": w.rows_of(104, 3), "test": w.rows_of(108, 3)}
    for name in ("validation", "test"):
        last = splits[name][0]["messages"][-1]
        last["content"], last["tool_calls"] = None, json.dumps(calls)
    split = w.dataset(w.World(tmp_path, project.store), splits)["grouped_split"]
    rows = w.tokenized(w.World(tmp_path, project.store), split, chat_template=str(template))
    grader = {"name": "exact", "kind": "exact_match"}
    settings = config(graders=[grader], rank_by=["exact"], require_improvement=False)
    _, found, out = run(project, rows, learned, settings)
    samples = pq.read_table(out / "samples.parquet").to_pylist()
    expected = {s["expected"] for s in samples if "<call>" in s["expected"]}
    assert expected == {f"<call>{json.dumps(calls)}</call>"}
    assert found["sides"]["test"]["generated"] == 3 and found["sides"]["test"]["ungradable"] == {"exact": 0}


def test_a_gate_that_nobody_passes_blocks_and_says_by_how_much(project, rows, learned):
    built, found, _ = run(project, rows, learned, config(gates=["val_loss <= 1e-9"], max_rows=4))
    failed = checks(built)["gates_passed"]
    assert not failed.passed and found["chosen_step"] == 60
    assert "no checkpoint passes the gates; step 60 is the best by rank" in failed.description
    assert [r["gates"] for r in failed.evidence["checkpoints"].value] == ["failed: val_loss <= 1e-09"] * 2


def test_without_graders_the_loss_alone_ranks_and_must_improve(project, rows, learned):
    settings = config(graders=[], rank_by=["-val_loss"])
    built, found, out = run(project, rows, learned, settings)
    assert found["chosen_step"] == 60 and list(found["tuned"]) == ["test_loss"]
    assert pq.read_table(out / "samples.parquet").num_rows == 0
    assert checks(built)["improvement"].passed and "below base" in checks(built)["improvement"].description


@pytest.mark.parametrize("merges", [True, False], ids=["merged, as on a CPU", "exchanged, as on a GPU"])
def test_adapters_are_judged_as_if_each_had_been_loaded_by_itself(project, rows, monkeypatch, merges):
    from sft_pipeline.stages.evaluation.judge import CheckpointModels

    monkeypatch.setattr(CheckpointModels, "_merges", merges)
    from sft_pipeline.training.generate import score_nll
    from sft_pipeline.training.model import load_for_inference

    trained = w.checkpoints(_sub(project), rows, ModelConfig(**LORA), {5: 0, 9: 0, 12: 0}, learn=False)
    built, found, _ = run(project, rows, trained, config(LORA, require_improvement=False, max_rows=3))
    table = pq.read_table(rows.parts("validation")[0])
    examples = list(zip(*(table.column(n).to_pylist() for n in ("input_ids", "labels", "weights"))))
    for entry in found["checkpoints"]:
        alone = score_nll(
            load_for_inference(ModelConfig(**LORA), trained.file(f"checkpoint-{entry['step']}")), examples
        )
        assert entry["val_loss"] == pytest.approx(
            sum(a for a, _ in alone) / sum(n for _, n in alone), abs=2e-5
        )
    assert len({e["val_loss"] for e in found["checkpoints"]}) == 3
    test = pq.read_table(rows.parts("test")[0])
    base = score_nll(
        load_for_inference(ModelConfig(**LORA), None),
        list(zip(*(test.column(n).to_pylist() for n in ("input_ids", "labels", "weights")))),
    )
    assert found["base"]["test_loss"] == pytest.approx(
        sum(a for a, _ in base) / sum(n for _, n in base), abs=2e-5
    )
    improvement = checks(built)["improvement"]
    assert improvement.passed and improvement.description.startswith(
        "not required (evaluation.require_improvement is false): tuned 0 is not above base 0"
    )


def test_no_improvement_blocks_with_the_numbers(project, rows, learned):
    graders = [{"name": "always", "kind": "regex", "pattern": "(?s)."}]
    built, _, _ = run(
        project, rows, learned, config(graders=graders, rank_by=["-val_loss", "always"], max_rows=3)
    )
    assert checks(built)["improvement"].passed
    built, found, _ = run(
        project,
        rows,
        learned,
        config(
            graders=[*GRADERS, {"name": "never", "kind": "regex", "pattern": "zzzz"}],
            rank_by=["never"],
            max_rows=3,
        ),
    )
    failed = checks(built)["improvement"]
    assert not failed.passed and failed.description.startswith(
        "tuned 0 is not above base 0 on never (3 test rows"
    )
    assert found["chosen_step"] == 10  # a tie: the earliest


def test_an_empty_validation_split_blocks_with_the_remedy(project, learned):
    world = _sub(project)
    split = w.dataset(world, {"train": w.rows_of(0, 4), "test": w.rows_of(4, 2)})
    rows = w.tokenized(world, split["grouped_split"])
    built, found, _ = run(world, rows, learned, config(gates=["format_pass_rate >= 0.5"]))
    assert (
        not checks(built)["gates_passed"].passed
        and "raise split.validation" in checks(built)["gates_passed"].description
    )
    assert found["checkpoints"][0]["val_loss"] is None


def test_a_grader_that_does_not_fit_the_data_stops_before_any_model_is_loaded(project, rows, learned):
    heard = RecordingReporter()
    with pytest.raises(InputError, match="grader sum: no expected completion can be graded against"):
        run(
            project,
            rows,
            learned,
            config(graders=[{"name": "sum", "kind": "numeric_answer", "after": "####"}], rank_by=["sum"]),
            heard,
        )
    assert not heard.bars


def _sub(project):
    """Another folder for intermediate output, the same store and project."""
    sub = project.root / f"sub{len(list(project.root.glob('sub*')))}"
    sub.mkdir()
    (sub / "base").symlink_to(project.root / "base")
    return w.World(sub, project.store)


@pytest.mark.parametrize("off", [0.0, 1e-5, 0.01, -0.01])
def test_a_model_with_another_loss_than_training_recorded_is_not_the_trained_one(project, rows, off):
    trained = w.checkpoints(_sub(project), rows, ModelConfig(**LORA), {5: 0, 9: 0}, learn=False)
    built, found, _ = run(project, rows, trained, config(LORA, require_improvement=False, max_rows=2))
    assert "no validation loss to compare" in checks(built)["judged_is_trained"].description
    path = trained.file("training.json")
    training = json.loads(path.read_text())
    training["checkpoints"] = [
        {"step": e["step"], "val_loss": e["val_loss"] * (1 + off * (e["step"] == 9))}
        for e in found["checkpoints"]
    ]
    path.write_text(json.dumps(training))
    built, _, _ = run(project, rows, trained, config(LORA, require_improvement=False, max_rows=2))
    check = checks(built)["judged_is_trained"]
    assert check.passed == (abs(off) < 1e-3)
    assert check.passed or check.description.startswith("step 9: training recorded")


def test_a_loss_that_is_no_number_only_in_evaluation_is_not_the_trained_one(project, rows):
    trained = w.checkpoints(_sub(project), rows, ModelConfig(**LORA), {5: 0}, learn=False)
    training = json.loads(trained.file("training.json").read_text())
    training["checkpoints"] = [{"step": 5, "val_loss": 2.5}]
    trained.file("training.json").write_text(json.dumps(training))
    for loss, passed in ((2.5, True), (2.6, False), (math.nan, False), (math.inf, False)):
        assert judged_is_trained(trained, {5: loss}).passed == passed, loss
    # QLoRA: the 4-bit model must be the trained one, and how far from it the exported one is is stated.
    for exported, four_bit, passed in ((2.7, 2.5, True), (2.5, 2.7, False), (math.nan, 2.5, False)):
        check = judged_is_trained(trained, {5: exported}, {5: four_bit})
        assert check.passed == passed, (exported, four_bit)
        assert ("differ from it by at most 0.2000 (step 5: 2.7000)" in check.description) == passed
