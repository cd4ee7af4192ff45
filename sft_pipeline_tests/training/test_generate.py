"""Generation and scoring do not depend on what shares a batch."""

import pytest
import torch

from sft_pipeline.training.generate import Reply, generate, score_nll
from sft_pipeline_tests.training import tiny

PROMPTS = [e["input_ids"][: e["prompt_length"]] for e in tiny.examples(9, seed=2)]


@pytest.fixture(scope="module", params=["llama", "qwen"])
def model(request):
    return {"llama": tiny.llama, "qwen": tiny.qwen}[request.param](seed=7)


def test_greedy_replies_equal_the_library_s_own_one_by_one(model):
    found = generate(model, PROMPTS, max_new_tokens=12, stop_ids={tiny.EOS, 40}, pad_id=0, batch_size=4)
    for prompt, reply in zip(PROMPTS, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[tiny.EOS, 40]
        )[0, len(prompt) :].tolist()
        ended = expected[-1] in (tiny.EOS, 40)
        assert reply == Reply(expected[:-1] if ended else expected, ended)


def test_replies_keep_their_order_and_do_not_depend_on_the_batch(model):
    alone = [generate(model, [p], max_new_tokens=10, stop_ids={tiny.EOS}, pad_id=0)[0] for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=10, stop_ids={tiny.EOS}, pad_id=5, batch_size=9) == alone


def test_sampling_is_repeatable_and_seeded_by_prompt(model):
    class Warm:
        temperature, top_p, seed = 1.0, 0.9, 3

    a = generate(model, PROMPTS, max_new_tokens=8, stop_ids=set(), pad_id=0, batch_size=9, decoding=Warm())
    b = generate(model, PROMPTS, max_new_tokens=8, stop_ids=set(), pad_id=0, batch_size=2, decoding=Warm())
    assert a == b and len({tuple(r.ids) for r in a}) > 1
    Warm.seed = 4
    assert generate(model, PROMPTS, max_new_tokens=8, stop_ids=set(), pad_id=0, decoding=Warm()) != a


def test_replies_end_where_the_positions_end(model):
    long = [5] * 250
    [reply, empty, full] = generate(model, [long, [], [5] * 256], max_new_tokens=50, stop_ids=set(), pad_id=0)
    assert len(reply.ids) == 6 and not reply.finished
    assert empty == full == Reply([], False)


def test_a_finished_row_does_not_disturb_the_others_when_it_leaves_the_batch(model):
    first = generate(model, PROMPTS, max_new_tokens=12, stop_ids=set(), pad_id=0, batch_size=9)
    stops = {r.ids[1] for r in first[:6]}
    found = generate(model, PROMPTS, max_new_tokens=12, stop_ids=stops, pad_id=0, batch_size=9)
    for before, after in zip(first, found, strict=True):
        cut = next((k for k, t in enumerate(before.ids) if t in stops), None)
        assert after == (Reply(before.ids[:cut], True) if cut is not None else before)


def test_the_model_is_left_in_its_mode(model):
    model.train()
    generate(model, PROMPTS[:1], max_new_tokens=2, stop_ids=set(), pad_id=0)
    score_nll(model, [([1, 5, 6], [-100, 5, 6], None)])
    assert model.training
    model.eval()


def test_scores_equal_the_model_s_own_loss_and_first_labels_are_not_counted(model):
    examples = [(e["input_ids"], e["labels"], None) for e in tiny.examples(15, seed=8)] + [
        ([7, 8], [7, 8], None),
        ([7, 8], [7, -100], None),
    ]
    found = score_nll(model, examples, batch_tokens=60)
    for (ids, labels, _), (nll, count) in zip(examples, found, strict=True):
        assert count == sum(label != -100 for label in labels[1:])
        if count:
            assert nll == pytest.approx(
                model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * count,
                rel=1e-4,
            )
        else:
            assert nll == 0
