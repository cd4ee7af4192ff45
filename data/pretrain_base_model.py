"""Pretrain the small base model in ``base_model/`` and its tokenizer, from scratch.

A Llama of about a million parameters learns to chat a little: to copy ids, look
things up, compare numbers, write the JSON it is asked for and read short notes
in the words of the access desk.  It never sees a question of the access policy
with its answer, so fine-tuning has the policy left to teach; but it has seen every
token that the policy needs, since LoRA leaves the embeddings as they are.

    python data/pretrain_base_model.py           # trains, probes, writes the card
    python data/pretrain_base_model.py --probe   # probes and rewrites the card
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import make_access_policy as desk
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SEED = 7
VOCABULARY = 1280
COPYING, MIXTURE = 300, 1000  # updates of each phase
CONVERSATIONS = 48  # in an update
THREADS = 2
PROMPT_WEIGHT = 0.1  # of the loss at a prompt's tokens, against 1 at a reply's
OUTPUT = Path(__file__).resolve().parent / "base_model"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# --- the tasks ---------------------------------------------------------------

DECISIONS = ["approve", "deny", "escalate"]
KEYS = [
    "decision",
    "policy",
    "subject",
    "id",
    "person",
    "role",
    "place",
    "wish",
    "days",
    "city",
    "team",
    "colour",
]
COLOURS = ["red", "blue", "green", "white", "black"]
YES_NO, WORDS, ID, NUMBER = "yes|no", r"[\w' -]+", r"[A-Z]\d{4}", r"\d+"


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and the pattern of a well-formed answer."""

    task: str
    question: str
    answer: str
    form: str


def an_id(rng: random.Random) -> str:
    return f"{rng.choice('BDGKQRTX')}{rng.randint(1000, 9999)}"


def a_rule(rng: random.Random) -> str:
    return f"AP-{rng.randint(0, 12):02d}"


def a_word(rng: random.Random) -> str:
    return rng.choice(
        rng.choice(
            [
                DECISIONS,
                COLOURS,
                desk.CITIES,
                desk.WEEKDAYS,
                desk.TEAMS,
                desk.GIVEN,
                desk.FAMILY,
                desk.SERVICES,
                KEYS,
                [an_id(rng)],
                [a_rule(rng)],
                [str(rng.randint(1, 200))],
            ]
        )
    )


def as_json(values: dict[str, object]) -> str:
    return json.dumps(values, separators=(",", ":"))


def json_form(keys: list[str]) -> str:
    return r"\{" + ",".join(rf'"{key}":("[^"]*"|\d+)' for key in keys) + r"\}"


def repeat(rng: random.Random, longest: int = 6) -> Turn:
    words = " ".join(a_word(rng) for _ in range(rng.randint(1, longest)))
    return Turn(
        "repeat words",
        rng.choice(["Repeat: {}", "Say: {}", "Echo this back: {}"]).format(words),
        words,
        r"[\w -]+",
    )


def position(rng: random.Random) -> Turn:
    words = [a_word(rng) for _ in range(rng.randint(2, 5))]
    which = rng.choice(["first", "last"])
    question = f"{', '.join(words)}. Which word is {which}?"
    return Turn("first or last word", question, words[0 if which == "first" else -1], WORDS)


def look_up(rng: random.Random) -> Turn:
    names = rng.sample(desk.GIVEN + DECISIONS + COLOURS, rng.randint(2, 4))
    verb, question, values = rng.choice(
        [
            ("lives in", "Where does {} live?", desk.CITIES),
            ("works in", "Which team is {} in?", desk.TEAMS),
            ("holds", "Which id does {} hold?", [an_id(rng) for _ in range(9)]),
            ("means", "What does {} mean?", DECISIONS + COLOURS + [a_rule(rng) for _ in range(4)]),
        ]
    )
    facts = {name: rng.choice(values) for name in names}
    asked = rng.choice(names)
    said = " ".join(f"{name[0].upper() + name[1:]} {verb} {value}." for name, value in facts.items())
    return Turn("look up", f"{said} {question.format(asked)}", facts[asked], WORDS)


def compare(rng: random.Random) -> Turn:
    n, limit = (rng.choice([rng.choice(desk.DAYS), rng.randint(1, 150)]) for _ in range(2))
    question = rng.choice(["Is {} more than {}?", "Are {} days more than {} days?", "Is {} over {}?"]).format(
        n, limit
    )
    return Turn("compare numbers", question, "yes" if n > limit else "no", YES_NO)


def larger(rng: random.Random) -> Turn:
    a, b = rng.sample(range(1, 200), 2)
    return Turn("larger number", f"Which is larger, {a} or {b}?", str(max(a, b)), NUMBER)


def member(rng: random.Random) -> Turn:
    words = [a_word(rng) for _ in range(rng.randint(2, 5))]
    asked = rng.choice(words) if rng.random() < 0.5 else a_word(rng)
    return Turn(
        "is it in the list",
        f"List: {', '.join(words)}. Is {asked} in the list?",
        "yes" if asked in words else "no",
        YES_NO,
    )


def count(rng: random.Random) -> Turn:
    words = [a_word(rng) for _ in range(rng.randint(1, 6))]
    return Turn("count words", f"How many words: {', '.join(words)}?", str(len(words)), NUMBER)


def pairs_to_json(rng: random.Random) -> Turn:
    keys = rng.sample(KEYS, rng.randint(1, 4))
    special = {
        "decision": DECISIONS + COLOURS,
        "policy": [a_rule(rng)],
        "subject": [an_id(rng)],
        "id": [an_id(rng)],
    }
    values = {key: rng.choice(special.get(key, [a_word(rng)])) for key in keys}
    said = rng.choice([", ", "; "]).join(f"{key} {value}" for key, value in values.items())
    return Turn(
        "pairs to JSON",
        rng.choice(["As JSON: {}.", "Write JSON with {}.", "{}. Give me that as JSON."]).format(said),
        as_json(values),
        json_form(keys),
    )


GENERAL: list[Callable[[random.Random], Turn]] = [
    repeat,
    position,
    look_up,
    compare,
    compare,
    larger,
    member,
    count,
    pairs_to_json,
    pairs_to_json,
]

# --- reading a note in the words of the access desk: what it says, never what follows from it ---

FACT_QUESTIONS = {
    "gone": ["Is {p} gone?", "Did {p} leave or get suspended?"],
    "gone service": ["Is {p} gone?", "Was {p} shut down?"],
    "compromised": ["Is the {k} lost, stolen or leaked?", "Is the {k} compromised?"],
    "trained": ["Is the security course done?", "Has {p} passed the security course?"],
    "sponsored": ["Is there a sponsor?", "Does anybody sponsor {p}?"],
    "frozen": ["Is the change freeze on?", "Are changes frozen?"],
    "signed off": ["Did data protection sign it off?"],
    "contract": ["Is there a contract?", "Is the contract signed?"],
}
PROBLEMS = {
    "gone": "gone",
    "gone service": "gone",
    "compromised": "loss",
    "trained": "course",
    "sponsored": "sponsor",
    "frozen": "freeze",
    "signed off": "data",
    "contract": "contract",
}  # what a trouble is called in a list


def note(rng: random.Random) -> tuple[str, list[Turn]]:
    """A few sentences about a made-up request, and questions about single things that they say."""
    kind = rng.choice(list(desk.DESKS))
    case = desk.draw_case(rng, kind, f"{desk.DESKS[kind][1]}{rng.randint(1000, 9999)}")
    said = desk.statements(rng, case)
    said = {name: said[name] for name in rng.sample(sorted(said), rng.randint(0, len(said)))}
    body = [desk.request(rng, case), desk.fill(rng, rng.choice(desk.ROLES[case.role]), case), *said.values()]
    body += [desk.fill(rng, text, case) for text in rng.sample(desk.ASIDES, rng.randint(0, 2))]
    rng.shuffle(body)
    greeting, farewell = (
        desk.fill(rng, rng.choice(desk.OPENERS + desk.FOLLOW_UPS), case),
        desk.fill(rng, rng.choice(desk.CLOSERS), case),
    )
    body = [greeting] * (rng.random() < 0.3) + body + [farewell] * (rng.random() < 0.3)

    fields: dict[str, object] = {"id": case.subject, "person": case.requester, "wish": case.action}
    fields |= {"place": case.place} if case.place else {"content": case.content, "receiver": case.destination}
    fields |= {"days": case.days} if case.action == "extend" else {}
    asked = {
        "id": "Which id?",
        "person": "Who is it about?",
        "wish": "Is it to use, renew or extend?",
        "place": "Which place?",
        "content": "What is in the export?",
        "receiver": "Who receives it?",
        "days": "How many days?",
    }
    forms = {"id": ID, "wish": "use|renew|extend", "days": NUMBER}
    turns = [
        Turn(f"note: {key}", asked[key], str(value), forms.get(key, WORDS)) for key, value in fields.items()
    ]
    for name, questions in FACT_QUESTIONS.items():
        question = rng.choice(questions).format(p=case.requester, k=desk.DESKS[kind][2])
        if name in said:
            turns += [
                Turn("note: fact", question, "yes" if case.facts[name] else "no", "yes|no|not stated")
            ] * 2
        elif name in case.facts and rng.random() < 0.4:
            turns.append(Turn("note: fact", question, "not stated", "yes|no|not stated"))
    keys = rng.sample(sorted(fields), rng.randint(1, 3))
    turns.append(
        Turn(
            "note: JSON",
            f"As JSON: {', '.join(keys)}.",
            as_json({k: fields[k] for k in keys}),
            json_form(keys),
        )
    )
    rng.shuffle(turns)
    problems = sorted(PROBLEMS[name] for name in said if case.facts[name] == desk.TROUBLE[name])
    listed = Turn("note: problems", "Problems?", ", ".join(problems) or "none", r"none|\w+(, \w+)*")
    state = {PROBLEMS[name]: "bad" if PROBLEMS[name] in problems else "good" for name in said}
    told = " ".join(f"{name} {state[name]}" for name in sorted(state))
    stated = Turn(
        "note: states", "What is said?", told or "nothing", r"nothing|\w+ (good|bad)( \w+ (good|bad))*"
    )
    wish, limit = rng.choice(["use", "renew", "extend"]), rng.choice([12, 25, 40, 80])
    condition, holds = rng.choice(
        [
            (f"it is to {wish}", case.action == wish),
            (f"it is to {wish}", case.action == wish),
            (f"it is for more than {limit} days", case.action == "extend" and case.days > limit),
        ]
    )
    turns.insert(
        rng.randint(0, 1),
        Turn(
            "note: problems if",
            f"If {condition}: problems?",
            listed.answer if holds else "does not apply",
            r"does not apply|\w+(, \w+)*",
        ),
    )
    turns.insert(rng.randint(0, 1), listed)
    turns.insert(rng.randint(0, 2), stated)
    return " ".join(body), turns


def conversation(rng: random.Random) -> list[Turn]:
    """One to four turns; the first holds all that the later ones ask about."""
    if rng.random() < 0.25:
        return [rng.choice(GENERAL)(rng) for _ in range(rng.randint(1, 3))]
    text, turns = note(rng)
    first = turns[0]
    joined = f"{first.question} {text}" if rng.random() < 0.3 else f"{text} {first.question}"
    return [Turn(first.task, joined, first.answer, first.form), *turns[1 : rng.randint(3, 6)]]


# --- tokenizer and model -----------------------------------------------------


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE; newlines and digits always stand alone, so text before a reply never merges into it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((m["content"] for _ in range(8000) for m in messages(conversation(rng))), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> tuple[list[int], list[float]]:
    """Ids of a conversation as the chat template renders it, and the loss weight of each id."""
    ids, weights = [], []
    for turn in turns:
        asked = f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        for text, weight in (
            (asked, PROMPT_WEIGHT),
            (f"{turn.answer}<|im_end|>", 1.0),
            ("\n", PROMPT_WEIGHT),
        ):
            piece = tokenizer(text)["input_ids"]
            ids += piece
            weights += [weight] * len(piece)
    return ids, weights


def batches(
    tokenizer: PreTrainedTokenizerFast, draw: Callable[[], list[Turn]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and weights, each (CONVERSATIONS, longest), right-padded; a batch holds similar lengths."""
    shuffle = random.Random(SEED).shuffle
    while True:
        pool = sorted((encode(tokenizer, draw()) for _ in range(CONVERSATIONS * 16)), key=lambda e: len(e[0]))
        groups = [pool[n : n + CONVERSATIONS] for n in range(0, len(pool), CONVERSATIONS)]
        shuffle(groups)
        for group in groups:
            ids = torch.full((len(group), len(group[-1][0])), tokenizer.pad_token_id)
            weights = torch.zeros(ids.shape)
            for row, (i, w) in enumerate(group):
                ids[row, : len(i)], weights[row, : len(i)] = torch.tensor(i), torch.tensor(w)
            yield ids, weights


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest.

    With AdamW alone, copying an id was still at 0 % after 1,200 updates; with Muon it comes within 200.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> int:
    """Copying first, then the mixture; trains in place and returns the number of tokens seen."""
    course = chain(
        islice(batches(tokenizer, lambda: [repeat(rng, 10)]), COPYING),
        islice(batches(tokenizer, lambda: conversation(rng)), MIXTURE),
    )
    updates, tokens, both = COPYING + MIXTURE, 0, optimizers(model)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min((n + 1) / 30, 1.5 * (1 - n / updates), 1.0)
        )
        for optimizer in both
    ]
    model.train()
    progress = tqdm(course, total=updates, desc="pretraining", mininterval=5)
    for ids, weights in progress:
        logits = model(ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*both, *rates):
            step.step()
        model.zero_grad(set_to_none=True)
        tokens += int((weights > 0).sum())
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return tokens


# --- what it can do, and the card ---------------------------------------------


@torch.no_grad()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]
) -> list[tuple[str, bool]]:
    """Greedy replies of at most 64 tokens, and whether each ended with the stop token."""
    replies = []
    for n in tqdm(range(0, len(questions), 64), desc="probing"):
        chats = [[{"role": "user", "content": q}] for q in questions[n : n + 64]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        replies += [
            (tokenizer.decode(ids, skip_special_tokens=True), tokenizer.eos_token_id in ids) for ids in output
        ]
    return replies


def probe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[float]]:
    """Per task of 40 fresh single-turn prompts: fractions that ended, were on format, were right."""
    rng, asked = random.Random(f"probe {SEED}"), {}
    for _ in range(6000):
        turn = conversation(rng)[0]
        asked.setdefault(turn.task, []).append(turn)
    turns = [turn for task in sorted(asked) for turn in asked[task][:40]]
    scores: dict[str, list[list[bool]]] = {}
    for turn, (text, ended) in zip(
        turns, answers(model, tokenizer, [t.question for t in turns]), strict=True
    ):
        on_format = ended and re.fullmatch(turn.form, text) is not None
        scores.setdefault(turn.task, []).append([ended, on_format, text == turn.answer])
    scores["all"] = [row for rows in scores.values() for row in rows]
    return {
        task: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for task, rows in scores.items()
    }


def card(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, float]) -> str:
    """The model card; every figure is read from the model or measured here."""
    c = model.config
    table = "\n".join(
        f"| {task} | {a:.0%} | {b:.0%} | {r:.0%} |" for task, (a, b, r) in probe(model, tokenizer).items()
    )
    return f"""# base_model: a small chat model to fine-tune

License: Apache-2.0. Pretrained from scratch on synthetic text by `data/pretrain_base_model.py`; made for \
demonstrations and tests, of no other use.

## Architecture

| | |
| --- | --- |
| class | `{type(model).__name__}`, fp32, tied embeddings |
| parameters | {model.num_parameters():,} |
| layers, heads, hidden, intermediate | {c.num_hidden_layers}, {c.num_attention_heads}, {c.hidden_size}, \
{c.intermediate_size} |
| longest context | {c.max_position_embeddings} positions (the training texts have at most about 300 tokens) |

## Tokenizer

Byte-level BPE with {len(tokenizer)} tokens, trained on the pretraining mixture. Digits and newlines always \
stand alone. Control tokens: {", ".join(f"`{t}`" for t in tokenizer.all_special_tokens)}; \
`{tokenizer.eos_token}` ends a turn and stops generation, `{tokenizer.pad_token}` pads (on the left by \
default). The chat template is ChatML with `{{% generation %}}` around each reply and its \
`{tokenizer.eos_token}`; the prompt with `add_generation_prompt=True` is an exact prefix of the full \
conversation.

## Training

{COPYING} updates of repeating words, then {MIXTURE} of the mixture below, each of {CONVERSATIONS} \
conversations ({facts["tokens"]:,} tokens in all). Muon for the matrices of the layers, AdamW for the rest, \
loss weight {PROMPT_WEIGHT} at prompts and 1 at replies, seed {SEED}, {facts["minutes"]:.1f} minutes on \
{THREADS} CPU threads.

- 25 % general tasks: repeating words, first or last word, looking up a fact of a name, comparing numbers, \
membership, counting, turning named pairs into JSON. The words are those of the access dataset, its JSON \
keys, decisions and rule ids among others, drawn at random.
- 75 % notes: shuffled sentences about an invented request, in the phrases of the access dataset, with \
questions about single things they state (the id, the person, the place, the wish, the days, whether a fact \
holds, which facts are bad, or some of these as JSON).

No text relates a request to a decision or a rule: the access policy is unknown to this model.

## Probe

40 fresh prompts of each task, greedy: the fraction of replies that ended with the stop token, that ended \
and were on format, and that were exactly right.

| task | ended | on format | right |
| --- | --- | --- | --- |
{table}

## Regenerate

`python data/pretrain_base_model.py`; with `--probe` it only measures the table again and rewrites this card.
"""


def assert_sound(tokenizer: PreTrainedTokenizerFast) -> None:
    """The saved folder loads alike by both classes, and a prompt is a prefix of its conversation."""
    automatic = AutoTokenizer.from_pretrained(OUTPUT)
    rng = random.Random(SEED)
    for _ in range(200):
        turns = conversation(rng)
        chat = messages(turns)
        full = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert full[: len(asked)] == asked, "the generation prompt is no prefix of the conversation"
        assert full == encode(tokenizer, turns)[0], "pretraining and the chat template disagree"
        assert full == automatic.apply_chat_template(chat, return_dict=True)["input_ids"], (
            "AutoTokenizer disagrees"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--probe", action="store_true", help="only measure the saved model again and rewrite its card"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    record = OUTPUT / "training.json"
    if not arguments.probe:
        rng, start = random.Random(SEED), time.monotonic()
        tokenizer = train_tokenizer(rng)
        model = new_model(tokenizer)
        tokens = train(model, tokenizer, rng)
        model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=64,
        )
        model.save_pretrained(OUTPUT)
        tokenizer.save_pretrained(OUTPUT)
        record.write_text(json.dumps({"tokens": tokens, "minutes": (time.monotonic() - start) / 60}))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(OUTPUT)
    assert_sound(tokenizer)
    model = LlamaForCausalLM.from_pretrained(OUTPUT).eval()
    (OUTPUT / "README.md").write_text(card(model, tokenizer, json.loads(record.read_text())))


if __name__ == "__main__":
    main()
