"""A guess of how the rows of a file read: format, columns, roles, group key, what is to be arranged.

Judged by the first rows alone. What is not plain is said, so that somebody looks.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sft_pipeline.stages.validated_rows.detect import ENOUGH, format_of
from sft_pipeline.stages.validated_rows.formats import ROLES, look_up
from sft_pipeline.stages.validated_rows.normalized_row import MISSING

Rows = Sequence[Mapping[str, Any]]

# Names that people give to what asks and to what answers, the more telling first.
ASKS = (
    *("prompt", "question", "query", "instruction", "input", "problem", "request", "user", "source", "text"),
    *("utterance", "sentence", "review", "message", "content"),
)
IDS = ("id", "uuid", "guid", "hash", "key", "url", "date", "time", "timestamp", "lang", "language")
ANSWERS = (
    *("completion", "response", "answer", "output", "reply", "chosen", "solution", "target", "assistant"),
    *("label", "category", "intent", "class", "summary", "translation"),
)
SPEAKERS = {
    "user": ("customer", "client", "patient", "guest", "student", "caller", "visitor", "seeker", "buyer"),
    "assistant": ("agent", "operator", "doctor", "support", "teacher", "tutor", "helper", "advisor", "ai"),
}
ROLE_KEYS = ("role", "from", "speaker", "who", "author", "sender", "side")
TEXT_KEYS = ("content", "value", "text", "utterance", "message", "says", "body")
GROUPS = ("group", "thread", "conversation", "dialog", "dialogue", "case", "ticket", "document", "session")
ORDERS = ("turn", "order", "index", "position", "number", "step")
FEW_VALUES = 0.2  # distinct values to rows, up to which a column is a label
MOST_ROLES = 8


@dataclass
class Guess:
    """How the rows read.

    Attributes:
        source: Keys of a source in the dataset file.
        contract: Keys of `contract`.
        unsure: What somebody should look at.
        failed: Why there is no guess; empty where there is one.
    """

    source: dict[str, Any] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    unsure: list[str] = field(default_factory=list)
    failed: str = ""


def guess(rows: Rows) -> Guess:
    """The guess for rows of one source."""
    found = Guess()
    if not rows:
        found.failed = "no rows"
        return found
    formats = Counter(format_of(dict(row), {}) for row in rows)
    best, count = formats.most_common(1)[0]
    if best is not None and count >= ENOUGH * len(rows) and best != "turns":
        found.source["format"] = best
    elif not (_lists_of_turns(rows, found) or _turn_in_each_row(rows, found) or _pairs(rows, found)):
        names = ", ".join(name for name, _ in Counter(n for row in rows for n in row).most_common(12))
        found.failed = f"no prompt and reply could be told among the columns {names}"
        return found
    if found.source["format"] in ("messages", "sharegpt"):
        _look_at_turns(rows, found)
    if found.source["format"] != "turns" and (group := _group(rows, found)):
        found.source.setdefault("columns", {})["group"] = group
    return found


# -- conversations ---------------------------------------------------------------------------------


def _lists_of_turns(rows: Rows, found: Guess) -> bool:
    """A column that holds lists of objects, each with who speaks and what is said."""
    for name in _columns(rows):
        turns = [t for row in rows[:100] if isinstance(row.get(name), list) for t in row[name]]
        if not turns or not all(isinstance(t, dict) for t in turns):
            continue
        role, text = _key_of(turns, ROLE_KEYS, few=True), _key_of(turns, TEXT_KEYS)
        if role and text and role != text:
            columns = {"messages": name, "role": role, "content": text}
            found.source |= {"format": "messages", "columns": _renamed(columns)}
            return True
    return False


def _turn_in_each_row(rows: Rows, found: Guess) -> bool:
    """One turn per row: who speaks, what is said, and which dialogue it belongs to."""
    role, text = _key_of(rows, ROLE_KEYS, few=True), _key_of(rows, TEXT_KEYS)
    if not role or not text or role == text or not _all_roles(rows, role):
        return False
    columns = {"role": role, "content": text}
    dialogue = next((name for name in _columns(rows) if _is_group(rows, name)), None)
    if dialogue:
        columns["dialogue"] = dialogue
    else:
        found.unsure.append("no column names the dialogue of a turn, so each file is taken for one dialogue")
    if order := next((n for n in _columns(rows) if _named(n, ORDERS) and _all_numbers(rows, n)), None):
        columns["order"] = order
    found.source |= {"format": "turns", "columns": _renamed(columns)}
    if roles := _roles([str(row[role]) for row in rows if row.get(role)], found):
        found.source["roles"] = roles
    found.contract |= {"merge_consecutive": True, "drop_leading_assistant": True, "trim_trailing_user": True}
    return True


def _look_at_turns(rows: Rows, found: Guess) -> None:
    """Role names, and what the contract has to arrange so that turns alternate."""
    columns = found.source.get("columns", {})
    name = columns.get("messages") or (
        "messages" if found.source["format"] == "messages" else "conversations"
    )
    role_keys = (columns["role"],) if "role" in columns else ("role", "from")
    said: list[list[str]] = []
    for row in rows:
        turns = row.get(name)
        if isinstance(turns, list):
            values = [next((t[k] for k in role_keys if k in t), None) for t in turns if isinstance(t, dict)]
            said.append([str(v) for v in values if v is not None])
    roles = _roles([value for values in said for value in values], found)
    if roles:
        found.source["roles"] = roles
    known = [[roles.get(v) or ROLES.get(v.lower(), v) for v in values] for values in said]
    talks = [[r for r in each if r != "system"] for each in known]
    total = max(1, len(talks))
    if sum(bool(t) and t[-1] in ("user", "tool") for t in talks) > 0.05 * total:
        found.contract["trim_trailing_user"] = True
    if sum(bool(t) and t[0] == "assistant" for t in talks) > 0.05 * total:
        found.contract["drop_leading_assistant"] = True
    if sum(any(a == b != "tool" for a, b in pairwise(t)) for t in talks) > 0.05 * total:
        found.contract["merge_consecutive"] = True


def _roles(values: Sequence[str], found: Guess) -> dict[str, str]:
    """Role names that are not known, with the roles they may stand for."""
    strange = [v for v, _ in Counter(values).most_common() if v.lower() not in ROLES]
    roles: dict[str, str] = {}
    for value in strange[:MOST_ROLES]:
        roles[value] = next((r for r, names in SPEAKERS.items() if _named(value, names)), "")
    first = next((v for v in values if v in roles), None)
    for value, role in roles.items():
        if not role:
            roles[value] = "user" if value == first and "user" not in roles.values() else "assistant"
            found.unsure.append(f"the role name {value!r} is taken for {roles[value]}")
    return roles


# -- pairs of a prompt and a reply -----------------------------------------------------------------


def _pairs(rows: Rows, found: Guess) -> bool:
    """Two columns, perhaps inside others, of which one asks and the other answers."""
    texts = [name for name in _paths(rows[0]) if _mostly_text(rows, name) and not _named(name, IDS)]
    spoken = _by_role(rows, texts)
    if spoken:
        ask, answer = spoken
        found.unsure.append(f"the reply is {answer}: rows may have others, which are not read")
    else:
        ask = _best(texts, ASKS)
        answer = _best([n for n in texts if n != ask], ANSWERS)
        if not answer:
            labels = [n for n in texts if n != ask and _few(rows, n)]
            answer = labels[0] if labels else ""
        if not ask or not answer:
            others = sorted((n for n in texts if n not in (ask, answer)), key=lambda n: -_length(rows, n))
            if len(others) + bool(ask) + bool(answer) < 2:
                return False
            answer = answer or others[-1 if ask else 0]
            ask = ask or next(n for n in others if n != answer)
            found.unsure.append(f"{ask} is taken for the prompt and {answer} for the reply")
    found.source |= {
        "format": "prompt_completion",
        "columns": _renamed({"prompt": ask, "completion": answer}),
    }
    context = next((n for n in texts if _named(n, ("context", "passage", "document")) and n != ask), None)
    if context and not spoken:
        found.source["text"] = {"prompt": f"{{{context}}}\n\n{{{ask}}}"}
        found.source["columns"].pop("prompt", None)
        found.unsure.append(f"{context} is put before {ask}")
    return True


def _best(names: Sequence[str], words: Sequence[str]) -> str:
    """The name that is one of the words, else one that holds one; empty where there is none."""
    exact = (n for word in words for n in names if n.rpartition(".")[2].lower() == word)
    return next(exact, next((n for word in words for n in names if _named(n, (word,))), ""))


def _by_role(rows: Rows, texts: Sequence[str]) -> tuple[str, str] | None:
    """The first texts that have a role beside them: one of a user, one of an assistant."""
    sides: dict[str, str] = {}
    for name in texts:
        place = name.rpartition(".")[0]
        beside = f"{place}.role" if place else "role"
        said = look_up(rows[0], beside)
        if isinstance(said, str) and said.lower() in ROLES and _named(name, TEXT_KEYS):
            sides.setdefault(ROLES[said.lower()], name)
    return (sides["user"], sides["assistant"]) if {"user", "assistant"} <= sides.keys() else None


def _group(rows: Rows, found: Guess) -> str | None:
    """A column whose values recur and whose name says that it holds rows together."""
    used = set(found.source.get("columns", {}).values())
    names = [n for n in _columns(rows) if n not in used and _is_group(rows, n)]
    return names[0] if names else None


def _is_group(rows: Rows, name: str) -> bool:
    values = [row.get(name) for row in rows if isinstance(row.get(name), str | int)]
    if len(values) < ENOUGH * len(rows) or not _named(name, GROUPS):
        return False
    return len(set(values)) > 1


# -- columns ---------------------------------------------------------------------------------------


def _columns(rows: Rows) -> list[str]:
    return [n for n, c in Counter(n for row in rows for n in row).most_common() if c >= ENOUGH * len(rows)]


def _paths(row: Mapping[str, Any], above: str = "", depth: int = 4) -> Iterator[str]:
    """The dotted paths of all texts in a row; of lists the first element."""
    for name, value in row.items():
        path = f"{above}{name}"
        if isinstance(value, str):
            yield path
        elif isinstance(value, dict) and depth:
            yield from _paths(value, f"{path}.", depth - 1)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and depth:
            yield from _paths(value[0], f"{path}.0.", depth - 1)


def _values(rows: Rows, name: str) -> list[Any]:
    return [v for row in rows if (v := look_up(row, name)) is not MISSING and v is not None]


def _mostly_text(rows: Rows, name: str) -> bool:
    return sum(isinstance(v, str) and bool(v.strip()) for v in _values(rows, name)) >= 0.8 * len(rows)


def _few(rows: Rows, name: str) -> bool:
    values = [str(v) for v in _values(rows, name)]
    return bool(values) and len(set(values)) <= max(2, FEW_VALUES * len(values))


def _length(rows: Rows, name: str) -> float:
    values = [len(str(v)) for v in _values(rows, name)]
    return sum(values) / max(1, len(values))


def _all_numbers(rows: Rows, name: str) -> bool:
    return all(str(v).strip().lstrip("-").replace(".", "", 1).isdecimal() for v in _values(rows, name))


def _all_roles(rows: Rows, name: str) -> bool:
    values = {str(row.get(name)) for row in rows}
    known = [v for v in values if v.lower() in ROLES or any(_named(v, n) for n in SPEAKERS.values())]
    return len(values) <= MOST_ROLES and len(known) >= 2


def _key_of(turns: Sequence[Mapping[str, Any]], names: Sequence[str], *, few: bool = False) -> str | None:
    """The key of turns that is named like one of these; for roles, one of few values."""
    keys = [n for n, c in Counter(n for t in turns for n in t).items() if c >= ENOUGH * len(turns)]
    for wanted in names:
        for key in keys:
            if _named(key, (wanted,)) and (not few or len({str(t.get(key)) for t in turns}) <= MOST_ROLES):
                return key
    return None


def _named(name: str, words: Sequence[str]) -> bool:
    """Whether the last part of a name is, or holds, one of the words."""
    last = name.rpartition(".")[2]
    parts = re.findall(r"[A-Z]?[^\W\dA-Z_]+|[A-Z]+(?![a-z])|\d+", last)
    known = {p.lower() for p in parts} | {last.lower()}
    return any(word in known or f"{word}s" in known for word in words)


def _renamed(columns: Mapping[str, str]) -> dict[str, str]:
    """Without those that have the format's own name."""
    return {name: column for name, column in columns.items() if name != column}
