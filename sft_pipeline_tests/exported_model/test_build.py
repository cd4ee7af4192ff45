"""exported_model on real tiny models: proved by loading weights, tokenizer, card and lineage again."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from sft_pipeline.stages.exported_model.lineage import machine_paths, portable, safetensors_only
from sft_pipeline.stages.exported_model.verify import reload_tokenizer, served_prompt
from sft_pipeline.store import Store
from sft_pipeline.tables.held_out import probe_rows
from sft_pipeline.text.exported_tokenizer import write_tokenizer
from sft_pipeline.training.config import ModelConfig
from sft_pipeline.training.export import exact_device, load_exact, reload_model
from sft_pipeline.training.logits import difference, greedy, logits
from sft_pipeline_tests.evaluation import world as w
from sft_pipeline_tests.exported_model.branch import LORA, export, inputs_for


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("export_project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_PROJECT_ROOT", str(root))
        patch.setenv("SFT_HOME", str(root / "home"))
        w.write_base(root / "base")
        yield w.World(root, Store(root / "home"))


@pytest.fixture(scope="module")
def split(project):
    return w.dataset(
        project, {"train": w.rows_of(0, 12), "validation": w.rows_of(12, 4), "test": w.rows_of(16, 6)}
    )["grouped_split"]


@pytest.fixture(scope="module")
def inputs(project, split):
    return inputs_for(project, split, LORA, "lora")


@pytest.fixture(scope="module")
def exported(project, inputs):
    return export(project, inputs, LORA, license="apache-2.0")


def test_lora_is_merged_and_every_check_passes(exported):
    checks, built, out = exported
    assert {n: c.passed for n, c in checks.items()} == dict.fromkeys(checks, True), {
        n: c.description for n, c in checks.items() if not c.passed
    }
    for name in (
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "merged/config.json",
        "merged/generation_config.json",
        "merged/tokenizer.json",
        "merged/tokenizer_config.json",
        "merged/chat_template.jinja",
        "README.md",
        "lineage/chain.json",
    ):
        assert (out / name).is_file(), name
    assert built.counts["step"] == 7 and "lineage/" in built.volatile


def test_merged_logits_are_those_of_base_plus_adapter(exported, inputs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = exported[2]
    ids = torch.tensor(
        [pq.read_table(inputs["tokenized_rows"].parts("test")[0]).column("input_ids")[0].as_py()]
    )
    base = AutoModelForCausalLM.from_pretrained(out.parents[1] / "base")
    adapted = PeftModel.from_pretrained(base, str(out / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    with torch.no_grad():
        expected, got = adapted(ids).logits, merged(ids).logits
        with adapted.disable_adapter():
            plain = adapted(ids).logits
    assert (expected - got).abs().max() < 1e-4 < (expected - plain).abs().max()


def test_a_stranger_can_chat_with_it(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported[2] / "merged"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "May I open the red key?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=4)
    assert out.shape[1] <= prompt["input_ids"].shape[1] + 4
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == [2] and config["do_sample"] is False
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True) is True


def test_no_file_names_a_folder_of_this_machine(exported, project):
    for path in exported[2].rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for place in (str(project.root), str(project.store.home), "/tmp/", "/root/"):
                assert place.encode() not in data, (path, place)


def test_the_card_has_front_matter_results_samples_data_and_lineage(exported, inputs):
    from huggingface_hub import ModelCard

    text = (exported[2] / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert {r.metric_name for r in card.data.eval_results} == {"format_pass_rate", "test_loss"}
    for expected in (
        "| format_pass_rate |",
        "## Samples",
        "rows.jsonl",
        inputs["grouped_split"].manifest.fingerprint,
        inputs["trained_checkpoints"].manifest.data_version,
        "{% generation %}",
        "apply_chat_template",
        "apache-2.0",
        "learning_rate",
        "dataset/raw_rows",
    ):
        assert expected in text, expected


def test_the_manifest_chain_goes_back_to_the_source_files(exported):
    chain = json.loads((exported[2] / "lineage" / "chain.json").read_text())
    stages = [c["asset"].split("/")[1] for c in chain["chain"]]
    assert (
        stages.index("raw_rows")
        < stages.index("validated_rows")
        < stages.index("grouped_split")
        < stages.index("tokenized_rows")
        < stages.index("trained_checkpoints")
    )
    assert list(chain["source_files"]) == [f"snapshots/{w.SNAPSHOT}/rows.jsonl"]
    assert all((exported[2] / "lineage" / c["manifest"]).is_file() for c in chain["chain"])


def test_built_twice_all_but_the_volatile_files_are_the_same(project, inputs, exported):
    _, _, again = export(project, inputs, LORA, license="apache-2.0")
    for path in (p for p in again.rglob("*") if p.is_file() and "lineage" not in p.parts):
        assert path.read_bytes() == (exported[2] / path.relative_to(again)).read_bytes(), path


def test_bfloat16_is_within_what_rounding_explains(project, inputs):
    checks, _, out = export(project, inputs, LORA, dtype="bfloat16")
    assert (
        checks["merged_equals_adapter"].passed
        and "in bfloat16" in checks["merged_equals_adapter"].description
    )
    assert checks["reload_answers_equal"].passed
    assert json.loads((out / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_merging_the_adapter_carries_the_tokenizer(project, inputs):
    checks, _, out = export(project, inputs, LORA, merge=False)
    assert all(c.passed for c in checks.values()), {n: c.description for n, c in checks.items()}
    assert not (out / "merged").exists() and (out / "adapter" / "chat_template.jinja").is_file()
    assert "PeftModel" in (out / "README.md").read_text()


def test_full_weights_with_a_named_template(project, split):
    model = ModelConfig(base="base", parameterization="full")
    checks, _, out = export(project, inputs_for(project, split, model, "full", chat_template="chatml"), model)
    assert all(c.passed for c in checks.values()), {n: c.description for n, c in checks.items()}
    assert not (out / "adapter").exists()
    assert "set eos" in (out / "merged" / "chat_template.jinja").read_text()


def test_qlora_is_merged_into_the_unquantized_base(project, split):
    pytest.importorskip("bitsandbytes")
    model = LORA.model_copy(update={"parameterization": "qlora"})
    checks, _, _ = export(project, inputs_for(project, split, model, "qlora"), model)
    merged = checks["merged_equals_adapter"]
    assert merged.passed and "the 4-bit model that was trained differs" in merged.description


def test_a_trained_qlora_model_merged_in_bf16_answers_as_its_adapter_does(project, split):
    """Logits within 4 % of the largest (measured: 2.0 % on the embedded base after 60 updates, less here),
    and the same greedy answers. The adapter stands on the base as it is: on the 4-bit base it was trained on,
    it is another model."""
    pytest.importorskip("bitsandbytes")
    model = LORA.model_copy(update={"parameterization": "qlora"})
    inputs = inputs_for(project, split, model, "qlora-trained", passes=30)
    checks, _, out = export(project, inputs, model, dtype="bfloat16")
    assert all(c.passed for c in checks.values()), {n: c.description for n, c in checks.items()}
    tokenized = inputs["tokenized_rows"]
    rows = probe_rows(tokenized, 6)
    merged = reload_model(out / "merged", trust_remote_code=False)
    apart = load_exact(model, inputs["trained_checkpoints"].file("checkpoint-7"))
    assert merged.dtype == torch.bfloat16
    sequences = [[*row.prompt, *row.target] for row in rows]
    found = difference(logits(apart, sequences), logits(merged, sequences))
    assert found.largest < 0.04 * found.scale
    stop = {"eos_token_id": merged.generation_config.eos_token_id, "pad_token_id": 0}
    prompts = [row.prompt for row in rows]
    assert greedy(merged, prompts, 12, **stop) == greedy(apart, prompts, 12, **stop)


def test_weights_that_were_not_merged_are_found(project, inputs, monkeypatch):
    monkeypatch.setattr("sft_pipeline.training.export.merge_adapter", lambda model: model.unload())
    checks, _, _ = export(project, inputs, LORA)
    assert (
        not checks["merged_equals_adapter"].passed
        and "more than rounding explains" in checks["merged_equals_adapter"].description
    )


def test_a_template_other_than_trainings_is_found(project, inputs, tmp_path):
    """The served prompt is compared by ids: here the template that is exported says "human" for "user"."""
    folder = tmp_path / "tokenized"
    shutil.copytree(inputs["tokenized_rows"].path, folder)
    formatting = json.loads((folder / "formatting.json").read_text())
    formatting["chat_template"] = formatting["chat_template"].replace("{{ m.role }}", "human")
    (folder / "formatting.json").write_text(json.dumps(formatting))
    changed = type(inputs["tokenized_rows"])(project.store.objects / folder.name)
    shutil.copytree(folder, changed.path)
    checks, _, _ = export(project, {**inputs, "tokenized_rows": changed}, LORA)
    failed = checks["served_prompt_equal"]
    assert (
        not failed.passed
        and "training has" in failed.description
        and len(failed.evidence["different"].value) == 10
    )
    shutil.rmtree(changed.path)


def test_a_machine_path_and_a_pickle_are_found(tmp_path):
    from safetensors.torch import save_file

    from sft_pipeline.project import project_root

    (tmp_path / "adapter_config.json").write_text('{\n "base": "/home/somebody/models/x"}')
    (tmp_path / "README.md").write_text(
        f"all fine\nmade in {project_root()}/runs\nA path like /home/x in a sample is text.\n"
    )
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"/home/": 1, "/tmp/": 2}}')
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"source": f"{project_root()}/w"}
    )
    found = [(f["file"], f["line"]) for f in machine_paths(tmp_path)]
    assert found == [("README.md", 2), ("adapter_config.json", 2), ("model.safetensors", 1)]
    unsafe = safetensors_only(tmp_path)
    assert not unsafe.passed and unsafe.description.endswith("hide weights: optimizer.pt")
    value = {
        "base": f"{project_root()}/data/base",
        f"{project_root()}/data/x": "h",
        "elsewhere": "/mnt/big/model",
        "regex": "^/home",
        "ratio": 1.5,
    }
    assert portable(value) == {
        "base": "data/base",
        "data/x": "h",
        "elsewhere": "…/model",
        "regex": "^/home",
        "ratio": 1.5,
    }


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["smollm2", "phi-3-mini", "qwen3", "minimind-6400", "gpt2"])
def test_real_tokenizers_are_served_as_trained(shared_data, tmp_path, name):
    """AutoTokenizer drops SmolLM2's digit splitting and rebuilds Phi-3's from its class; exports must not."""
    from sft_pipeline.text.find_template import load_template
    from sft_pipeline.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
    template = load_template("chatml" if name == "gpt2" else "tokenizer", tokenizer)
    write_tokenizer(tokenizer, template.text, tmp_path, pad_id=0)
    served = reload_tokenizer(tmp_path)
    for text in (
        "Natalia sold 48 clips in April, 2,048 in 2023.",
        "  Leading  spaces\n\nüñí 日本 🎉",
        "x = 12345.678e9",
    ):
        messages = [{"role": "user", "content": text}]
        prompt = template.render(messages, add_generation_prompt=True)
        assert served_prompt(served, messages, None) == tokenizer.ids(prompt)
        assert served(text, add_special_tokens=False)["input_ids"] == tokenizer.ids(text)


@pytest.mark.parametrize(("free", "expected"), [(1 << 40, "cuda"), (1000, "cpu")])
def test_fp32_weights_are_compared_where_they_fit(project, monkeypatch, free, expected):
    monkeypatch.setattr("sft_pipeline.training.export.training_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))
    assert exact_device(LORA).type == expected
