"""Write the access-policy dataset: two snapshots of requests to an access desk.

The policy is ``access_policy.md``; :func:`decide` is its only implementation.
Every row is a request in plain English (the facts, never the rule ids) with
the reply as JSON.  Some rows are broken on purpose and some are near-copies of
rows of another thread; the dataset card that this script writes counts them.

    python data/make_access_policy.py           # rewrites the same bytes
    python data/make_access_policy.py --check   # proves what the card promises
"""

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

SEED = 20260513
FIRST, SECOND = "2026-05-13", "2026-05-20"
HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "snapshots" / "access_policy"
CEILING = 0.5  # no two sound rows of different threads are this similar

# --- the world --------------------------------------------------------------

DESKS = {  # desk: (thread prefix, subject prefix, noun, a thread both snapshots hold)
    "badges": ("B", "D", "badge", 550),
    "keys": ("R", "K", "key", 550),
    "exports": ("T", "X", "export", 102),
    "accounts": ("P", "G", "account", 771),
}
ROOMS = ["the server room", "the vault", "the data hall", "the library", "the canteen", "the garage"]
SYSTEMS = [
    "the production cluster",
    "the payment system",
    "the live ledger",
    "the test cluster",
    "the wiki",
    "the sandbox",
]
DAYS = [5, 7, 10, 14, 20, 21, 30, 45, 60, 75, 90, 120]
PERSONAL = ["customer addresses", "patient records", "payroll figures", "home phone numbers"]
HARMLESS = ["sensor readings", "price lists", "build logs", "floor plans", "stock counts"]
FIRMS = ["Orlin Labs", "Baxter Freight", "Nordwind Media", "Kestrel Audit", "Tamsin Foods", "Helio Print"]
TEAMS = [
    "finance",
    "logistics",
    "research",
    "support",
    "legal",
    "design",
    "marketing",
    "facilities",
    "quality",
    "planning",
]
SERVICES = ["billing", "backup", "search", "mailer", "report", "metrics", "booking", "invoice"]
CITIES = [
    "Oslo",
    "Porto",
    "Ghent",
    "Turin",
    "Leeds",
    "Basel",
    "Riga",
    "Malmo",
    "Cork",
    "Graz",
    "Lyon",
    "Bonn",
]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
MONTHS = ["January", "February", "March", "April"]
GIVEN = [
    "Ada",
    "Bruno",
    "Carla",
    "Deniz",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Lena",
    "Marek",
    "Nadia",
    "Omar",
    "Petra",
    "Quinn",
    "Rosa",
    "Sven",
    "Tilda",
    "Umar",
    "Vera",
    "Wim",
    "Yara",
    "Zoe",
]
FAMILY = [
    "Abel",
    "Brandt",
    "Costa",
    "Dahl",
    "Egger",
    "Falk",
    "Gomez",
    "Hoff",
    "Ivers",
    "Jansen",
    "Keller",
    "Lund",
    "Mori",
    "Novak",
    "Okafor",
    "Patel",
    "Rossi",
    "Sato",
    "Thorn",
    "Vance",
    "Weber",
    "Yilmaz",
    "Zeman",
]

# --- how things are said ----------------------------------------------------

FRAMES = [
    "{p} wants to {w}.",
    "{p} asks to {w}.",
    "May {p} {w}?",
    "Can {p} {w}?",
    "{p} would like to {w}.",
    "We have a request from {p} to {w}.",
    "Please check whether {p} may {w}.",
    "Requester: {p}. Wish: {w}.",
    "Is it fine for {p} to {w}?",
    "The form says that {p} hopes to {w}.",
    "{p} called and plans to {w}.",
    "There is a note from {p}, who needs to {w}.",
]
WISHES = {
    ("badges", "use"): [
        "use badge {i} at {l}",
        "enter {l} with badge {i}",
        "walk into {l} on badge {i}",
        "open {l} with badge {i}",
    ],
    ("badges", "renew"): [
        "replace badge {i} for {l}",
        "get a new card for badge {i}, valid at {l}",
        "swap badge {i} of {l} for a fresh one",
    ],
    ("keys", "use"): [
        "use key {i} on {l}",
        "sign calls to {l} with key {i}",
        "connect to {l} through key {i}",
        "run a job on {l} with key {i}",
    ],
    ("keys", "renew"): [
        "rotate key {i} of {l}",
        "have key {i} for {l} rotated",
        "swap key {i} of {l} for a fresh one",
    ],
    ("accounts", "use"): [
        "log in to {l} as account {i}",
        "use account {i} on {l}",
        "work in {l} under account {i}",
    ],
    ("accounts", "renew"): [
        "reset account {i} on {l}",
        "get a new password for account {i} of {l}",
        "have account {i} for {l} reset",
    ],
    ("exports", "use"): [
        "send export {i} with {c} to {d}",
        "share {c} from export {i} with {d}",
        "hand export {i}, which holds {c}, over to {d}",
    ],
    ("exports", "extend"): [
        "keep export {i} with {c} open to {d} for {n} more days",
        "extend the link of export {i}, {c} for {d}, by {n} days",
    ],
    "extend": [
        "extend {k} {i} for {l} by {n} days",
        "keep {k} {i} valid at {l} for {n} more days",
        "add {n} days to {k} {i} of {l}",
        "let {k} {i} for {l} last {n} days longer",
    ],
}
ROLES = {
    "employee": [
        "{p} is an employee in {t}.",
        "{p} is on the staff of {t} in {city}.",
        "{p} has a permanent post in {t}.",
        "Role: employee, {t}.",
    ],
    "contractor": [
        "{p} is a contractor for {t}.",
        "{p} came through an agency as a contractor.",
        "{p} works on contract with {t} in {city}.",
        "Role: contractor, {t}.",
    ],
    "visitor": [
        "{p} is a visitor of {t}.",
        "{p} is visiting us from {city}.",
        "{p} is here as a visitor until {day}.",
        "Role: visitor, {t}.",
    ],
    "service": [
        "{p} is run by {t}.",
        "{p} is a service owned by {t}.",
        "{p} runs without a person, in {city}.",
    ],
}
# fact: {value: sentences}.  The value that a rule reacts to is in TROUBLE below.
FACTS = {
    "gone": {
        True: [
            "{p} left the company in {month}.",
            "{p} is suspended since {day}.",
            "{p} was let go in {month}.",
            "The staff list shows {p} as no longer with us.",
            "{p} has resigned and is already gone.",
        ],
        False: [
            "{p} is in good standing.",
            "{p} is still with us.",
            "The staff list shows {p} as active.",
            "{p} is not suspended.",
        ],
    },
    "gone service": {
        True: [
            "{p} was shut down in {month}.",
            "{p} has been retired.",
            "{p} is switched off for good since {day}.",
        ],
        False: ["{p} is up and running.", "{p} is still in service.", "{p} has not been retired."],
    },
    "compromised": {
        True: [
            "The {k} was stolen in {city}.",
            "The {k} went missing on {day}.",
            "The {k} was lost on a train to {city}.",
            "A copy of the {k} turned up on the web.",
            "The {k} leaked in a chat on {day}.",
            "A stranger has seen the {k}.",
            "The {k} is reported stolen since {day}.",
        ],
        False: [
            "The {k} was never lost.",
            "No loss of the {k} is known.",
            "The {k} is in safe hands.",
            "Nobody else has seen the {k}.",
        ],
    },
    "trained": {
        True: [
            "{p} passed the security course in {month}.",
            "The security course of {p} is up to date.",
            "{p} took the security course on {day}.",
            "Security course: done in {month}.",
        ],
        False: [
            "{p} has not done the security course.",
            "The security course of {p} ran out in {month}.",
            "{p} missed the security course in {month}.",
            "Security course: overdue since {month}.",
        ],
    },
    "sponsored": {
        True: [
            "{q} sponsors {p}.",
            "{q} from {team} vouches for {p}.",
            "Sponsor: {q}.",
            "{p} has {q} as sponsor.",
        ],
        False: [
            "{p} has no sponsor.",
            "Nobody vouches for {p}.",
            "Sponsor: none.",
            "No one in {t} sponsors {p}.",
        ],
    },
    "frozen": {
        True: [
            "The change freeze is on until {day}.",
            "We are inside the change freeze.",
            "A change freeze began on {day} and still holds.",
            "Change freeze: on.",
        ],
        False: [
            "The change freeze ended on {day}.",
            "There is no change freeze now.",
            "The change freeze was lifted.",
            "Change freeze: off.",
        ],
    },
    "signed off": {
        True: [
            "Data protection signed it off on {day}.",
            "Data protection agreed in {month}.",
            "Data protection: signed off by {q}.",
        ],
        False: [
            "Data protection has not signed it off.",
            "Data protection has yet to answer.",
            "Data protection: not signed off.",
        ],
    },
    "contract": {
        True: [
            "A signed contract with {d} is on file.",
            "{d} signed the contract in {month}.",
            "The contract with {d} is in place.",
        ],
        False: [
            "There is no contract with {d}.",
            "{d} has not signed the contract.",
            "The contract with {d} is missing.",
        ],
    },
}
TROUBLE = {
    "gone": True,
    "gone service": True,
    "compromised": True,
    "trained": False,
    "sponsored": False,
    "frozen": True,
    "signed off": False,
    "contract": False,
}
ASIDES = [
    "The call came from {city} on {day}.",
    "{q} from {team} is in copy.",
    "Ticket Q{num} has the same sender.",
    "Lunch with {q} is moved to {day}.",
    "{q} filed this on {day}.",
    "The desk phone is {num}.",
    "The team meets in {city} on {day}.",
    "{team} moved to {city} in {month}.",
    "{q} will be back on {day}.",
    "This came in as mail {num}.",
    "{q} sends greetings from {city}.",
    "It rained in {city} on {day}.",
    "The last audit was in {month}.",
    "{q} and {q2} share a desk in {city}.",
    "Ticket Q{num} is a separate matter.",
    "The answer goes to {q} in {team}.",
    "A parcel for {q} waits in {city}.",
    "The office in {city} closes on {day}.",
    "{q} asked twice since {month}.",
    "Please reply before {day}.",
    "{q} of {team} had a similar case in {month}.",
    "The train from {city} was late on {day}.",
]
OPENERS = [
    "Hello desk,",
    "Good morning.",
    "New case.",
    "Hi, a question.",
    "From the {team} queue:",
    "{day} shift:",
    "For the {city} desk:",
    "Logged by {q}:",
]
FOLLOW_UPS = [
    "Follow-up.",
    "Next question on this case.",
    "News on the same matter.",
    "One more thing here.",
    "Update from {day}:",
    "Second look at this case:",
    "{q} came back to it:",
]
CLOSERS = [
    "What do we answer?",
    "Is that allowed?",
    "How do we rule?",
    "Please decide.",
    "What is the ruling?",
    "Your decision, please.",
    "Can this go ahead?",
    "Tell {q} the outcome.",
]


OFTEN = 0.7  # a request in the dataset rarely has several troubles at once


# --- a case and the policy ---------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What one request says.  `facts` holds the truth of each fact that can apply to it."""

    desk: str
    action: str  # use, renew, extend
    subject: str
    requester: str
    role: str  # employee, contractor, visitor, service
    team: str
    place: str  # "" for exports
    content: str  # "" unless an export
    destination: str
    days: int  # meaningful for extend
    facts: dict[str, bool]

    @property
    def guest(self) -> bool:
        return self.role in ("contractor", "visitor")

    def must_say(self) -> set[str]:
        """Facts that a careful clerk states even where they are in order."""
        needed = {"signed off": self.content in PERSONAL, "contract": self.destination in FIRMS}
        return {name for name, value in needed.items() if value}


def decide(case: Case) -> tuple[str, str]:
    """The answer of `access_policy.md`: the first rule that applies."""
    trouble = {name.removesuffix(" service") for name, value in case.facts.items() if value == TROUBLE[name]}
    if "gone" in trouble:
        return "deny", "AP-01"
    if "compromised" in trouble:
        return "escalate", "AP-02"
    if case.content in PERSONAL and "signed off" in trouble:
        return "escalate", "AP-03"
    if case.destination in FIRMS and "contract" in trouble:
        return "deny", "AP-04"
    if case.guest and "sponsored" in trouble:
        return "deny", "AP-05"
    if case.action == "extend":
        return "escalate", "AP-06"
    if case.action == "renew" and "frozen" in trouble:
        return "deny", "AP-07"
    if "trained" in trouble:
        return "deny", "AP-08"
    return "approve", "AP-09"


def reply(case: Case) -> str:
    decision, policy = decide(case)
    return json.dumps(
        {"decision": decision, "policy": policy, "subject": case.subject}, separators=(",", ":")
    )


def full_name(rng: random.Random) -> str:
    return f"{rng.choice(GIVEN)} {rng.choice(FAMILY)}"


def draw_facts(rng: random.Random, case: Case, often: float = 1.0) -> dict[str, bool]:
    """Random truth of each fact that can apply to such a request; `often` scales how often it is bad."""
    service = case.role == "service"
    chance = {"gone service" if service else "gone": 0.1}  # of trouble
    chance |= {} if service else {"trained": 0.3}
    chance |= {} if case.desk == "exports" else {"compromised": 0.25}
    chance |= {"frozen": 0.4} if case.action == "renew" else {"frozen": 0.1}
    chance |= {"sponsored": 0.35} if case.guest and case.desk != "exports" else {}
    chance |= {"signed off": 0.5} if case.content in PERSONAL else {}
    chance |= {"contract": 0.5} if case.destination in FIRMS else {}
    return {name: TROUBLE[name] == (rng.random() < often * p) for name, p in chance.items()}


def draw_case(rng: random.Random, desk: str, subject: str, often: float = 1.0) -> Case:
    role = rng.choice(
        [
            "employee",
            "employee",
            "contractor",
            "contractor",
            "visitor",
            "visitor" if desk == "badges" else "service",
        ]
    )
    requester = f"the {rng.choice(SERVICES)} service" if role == "service" else full_name(rng)
    action = rng.choice(["use", "extend"] if desk == "exports" else ["use", "renew", "extend"])
    place = content = destination = ""
    if desk == "exports":
        content = rng.choice(rng.choice([PERSONAL, HARMLESS]))
        destination = rng.choice([rng.choice(FIRMS), f"the {rng.choice(TEAMS)} team"])
    else:
        place = rng.choice(ROOMS if desk == "badges" else SYSTEMS)
    case = Case(
        desk,
        action,
        subject,
        requester,
        role,
        rng.choice(TEAMS),
        place,
        content,
        destination,
        rng.choice(DAYS),
        {},
    )
    return replace(case, facts=draw_facts(rng, case, often))


def draw_case_for_rule(rng: random.Random, desk: str, subject: str) -> Case:
    """A case whose rule was drawn first, so that no rule is rare."""
    rules = [1, 3, 3, 3, 4, 4, 4, 6, 8, 9, 9] if desk == "exports" else [1, 2, 2, 5, 5, 6, 6, 7, 7, 8, 9, 9]
    wanted = f"AP-{rng.choice(rules):02d}"
    while decide(case := draw_case(rng, desk, subject, OFTEN))[1] != wanted:
        pass
    return case


def next_turn(rng: random.Random, case: Case) -> Case:
    """A later question about the same incident: another wish, or other facts."""
    action = rng.choice(["use", "extend"] if case.desk == "exports" else ["use", "renew", "extend"])
    changed = replace(case, action=action, days=rng.choice(DAYS))
    fresh = draw_facts(rng, changed, OFTEN)
    kept = {name: case.facts.get(name, value) for name, value in fresh.items()}
    for name in rng.sample(sorted(kept), min(2, len(kept))):
        kept[name] = fresh[name]
    return replace(changed, facts=kept)


# --- a case in words ---------------------------------------------------------


def fill(rng: random.Random, template: str, case: Case) -> str:
    """Put the case and small talk into a template; the sentence starts with a capital."""
    text = template.format(
        p=case.requester,
        i=case.subject,
        k=DESKS[case.desk][2],
        l=case.place,
        c=case.content,
        d=case.destination,
        t=case.team,
        n=case.days,
        w="{w}",
        q=full_name(rng),
        q2=full_name(rng),
        team=rng.choice(TEAMS),
        city=rng.choice(CITIES),
        day=rng.choice(WEEKDAYS),
        month=rng.choice(MONTHS),
        num=rng.randint(1000, 9999),
    )
    return text[0].upper() + text[1:]


def request(rng: random.Random, case: Case) -> str:
    wishes = WISHES.get((case.desk, case.action), WISHES["extend"])
    return fill(rng, rng.choice(FRAMES).replace("{w}", rng.choice(wishes)), case)


def statements(rng: random.Random, case: Case) -> dict[str, str]:
    """The sentences that state facts: all that matter, and some of those that are in order."""
    said = {name for name, value in case.facts.items() if value == TROUBLE[name] or rng.random() < 0.25}
    said |= case.must_say()
    return {name: fill(rng, rng.choice(FACTS[name][case.facts[name]]), case) for name in sorted(said)}


def prompt(rng: random.Random, case: Case, follow_up: bool) -> str:
    body = [fill(rng, rng.choice(ROLES[case.role]), case), *statements(rng, case).values()]
    asides = rng.choice([0, 1]) if len(body) > 2 else rng.choice([1, 2])
    body += [fill(rng, text, case) for text in rng.sample(ASIDES, asides)]
    rng.shuffle(body)
    body.insert(rng.choice([0, 0, len(body), rng.randint(0, len(body))]), request(rng, case))
    if follow_up or rng.random() < 0.3:
        body.insert(0, fill(rng, rng.choice(FOLLOW_UPS if follow_up else OPENERS), case))
    if rng.random() < 0.5:
        body.append(fill(rng, rng.choice(CLOSERS), case))
    return " ".join(body)


# --- rows, none of them too like another -------------------------------------

Row = dict[str, object]
Edition = tuple[bytes | None, bytes]  # a line's text in the first snapshot, and in the second
SPRING = [
    "2026-03-09",
    "2026-03-18",
    "2026-03-27",
    "2026-04-02",
    "2026-04-09",
    "2026-04-17",
    "2026-04-24",
    "2026-05-05",
    "2026-05-11",
]
WEEK = ["2026-05-13", "2026-05-14", "2026-05-15", "2026-05-18", "2026-05-19"]


def trigrams(row: Row) -> set[tuple[str, str, str]]:
    """The set of lowercase word 3-grams of prompt + " " + completion."""
    words = re.findall(r"\w+", f"{row['prompt']} {row['completion']}".lower())
    return set(zip(words, words[1:], words[2:], strict=False))


class Neighbours:
    """Finds the most similar row of another thread by exact Jaccard over 3-grams."""

    def __init__(self) -> None:
        self.rows: list[tuple[object, int]] = []  # thread, number of grams
        self.holders: dict[tuple[str, str, str], list[int]] = defaultdict(list)

    def closest(self, row: Row) -> float:
        grams = trigrams(row)
        shared = Counter(n for gram in grams for n in self.holders.get(gram, ()))
        return max(
            (
                both / (len(grams) + self.rows[n][1] - both)
                for n, both in shared.items()
                if self.rows[n][0] != row["thread_id"]
            ),
            default=0.0,
        )

    def add(self, row: Row) -> None:
        grams = trigrams(row)
        for gram in grams:
            self.holders[gram].append(len(self.rows))
        self.rows.append((row["thread_id"], len(grams)))


class Desk:
    """Makes the threads of one desk, each row unlike those of every other thread."""

    def __init__(self, name: str, rng: random.Random, neighbours: Neighbours) -> None:
        self.name, self.rng, self.neighbours = name, rng, neighbours
        self.subjects = iter(rng.sample(range(1000, 10000), 2000))
        self.cases: dict[str, Case] = {}  # the latest of each thread

    def turns(self, thread: str, count: int, opened: str) -> list[Row]:
        """`count` rows that start a thread, or go on with it where it is known."""
        rows = []
        for _ in range(count):
            follow_up = thread in self.cases
            subject = f"{DESKS[self.name][1]}{next(self.subjects)}"
            case = (
                next_turn(self.rng, self.cases[thread])
                if follow_up
                else draw_case_for_rule(self.rng, self.name, subject)
            )
            self.cases[thread] = case
            row: Row = {"thread_id": thread, "completion": reply(case), "opened": opened}
            while True:
                row["prompt"] = prompt(self.rng, case, follow_up)
                if self.neighbours.closest(row) < CEILING:
                    break
            self.neighbours.add(row)
            rows.append({name: row[name] for name in ("thread_id", "prompt", "completion", "opened")})
        return rows

    def threads(self, numbers: list[int], total: int, dates: list[str]) -> list[Row]:
        """`total` rows in threads of one to four turns, numbered from the front of `numbers`."""
        rows: list[Row] = []
        while len(rows) < total:
            count = min(self.rng.choice([1, 1, 1, 2, 2, 3, 3, 4]), total - len(rows))
            rows += self.turns(
                f"{DESKS[self.name][0]}{numbers.pop(0)}", count, dates[len(rows) * len(dates) // total]
            )
        return rows


# --- what is wrong on purpose ------------------------------------------------


def near_copy(rng: random.Random, row: Row) -> Row | None:
    """The same request with one weekday, city or month changed; None where that is not possible."""
    for words in (WEEKDAYS, CITIES, MONTHS):
        for word in words:
            if str(row["prompt"]).split().count(word) == 1 and str(row["prompt"]).count(word) == 1:
                other = rng.choice([w for w in words if w not in str(row["prompt"])])
                copy = {**row, "prompt": str(row["prompt"]).replace(word, other)}
                a, b = trigrams(row), trigrams(copy)
                return copy if len(a & b) / len(a | b) >= 0.87 else None
    return None


def line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def spliced(text: object, insert: str) -> str:
    """`insert` put between two words in the middle of `text`."""
    words = str(text).split(" ")
    return " ".join([*words[: len(words) // 2], insert, *words[len(words) // 2 :]])


# defect: (how a sound row becomes the broken line, how many are in the first snapshot, and in the second)
DEFECTS = {
    "empty completion": (lambda r: line({**r, "completion": ""}), 6, 10),
    "null completion": (lambda r: line({**r, "completion": None}), 5, 8),
    "no `thread_id`": (lambda r: line({k: v for k, v in r.items() if k != "thread_id"}), 6, 9),
    "whitespace-only prompt": (lambda r: line({**r, "prompt": "  \t \n"}), 5, 8),
    "number as completion": (lambda r: line({**r, "completion": 10}), 3, 5),
    "list as completion": (lambda r: line({**r, "completion": ["deny", "AP-03"]}), 3, 5),
    "exact duplicate of a row": (line, 7, 11),
    "truncated JSON line": (lambda r: line(r)[: len(line(r)) * 3 // 5], 5, 8),
    "invalid UTF-8 bytes": (
        lambda r: line({**r, "prompt": spliced(r["prompt"], "caf@")}).replace(b"@", b"\xe9"),
        4,
        6,
    ),
    "control token `<|im_end|>` in the prompt": (
        lambda r: line({**r, "prompt": spliced(r["prompt"], "<|im_end|>")}),
        4,
        6,
    ),
}
NEAR_COPY = "near-copy of a row of another thread"
NEAR_COPIES = 16, 28  # in the first snapshot, and in the second
SOUND_ROWS = 2336, 780  # of the first snapshot, and in threads that the second adds
LATER_TURNS = 80  # rows that the second snapshot adds to threads of the first
CORRECTED_REPLIES, CORRECTED_PROMPTS = 32, 32  # rows of the first snapshot that the second corrects


def slip(rng: random.Random, row: Row) -> Row:
    """The row as it stood before its reply was corrected: another rule was cited."""
    answer = json.loads(str(row["completion"]))
    wrong = [
        ("deny", "AP-01"),
        ("escalate", "AP-02"),
        ("escalate", "AP-06"),
        ("deny", "AP-08"),
        ("approve", "AP-09"),
    ]
    decision, policy = rng.choice([w for w in wrong if w[1] != answer["policy"]])
    answer |= {"decision": decision, "policy": policy}
    return {**row, "completion": json.dumps(answer, separators=(",", ":"))}


def typo(rng: random.Random, row: Row) -> Row:
    """The row as it stood before its prompt was corrected: two letters of one long word swapped."""
    words = str(row["prompt"]).split(" ")
    at = rng.choice(
        [n for n, w in enumerate(words) if w.isalpha() and w.islower() and len(w) > 4 and w[2] != w[3]]
    )
    w = words[at]
    words[at] = w[:2] + w[3] + w[2] + w[4:]
    return {**row, "prompt": " ".join(words)}


# --- the snapshots -----------------------------------------------------------


def special_lines(desk: Desk, kinds: list[str], sound: list[Row], numbers: list[int]) -> list[bytes]:
    """One line per kind of defect or near-copy, each (but a duplicate) in a thread of its own."""
    rng, lines = desk.rng, []
    for kind in kinds:
        thread = f"{DESKS[desk.name][0]}{numbers.pop(0)}"
        if kind == NEAR_COPY:
            while (copy := near_copy(rng, rng.choice(sound))) is None:
                pass
            lines.append(line({**copy, "thread_id": thread}))
        elif kind.startswith("exact duplicate"):
            lines.append(line(rng.choice(sound)))
        else:
            lines.append(DEFECTS[kind][0](desk.turns(thread, 1, rng.choice(sound)["opened"])[0]))
    return lines


def scatter(rng: random.Random, lines: list[Edition], among: list[Edition]) -> None:
    for item in lines:
        among.insert(rng.randint(1, len(among)), item)


def desk_lines(
    name: str, kinds: tuple[list[str], list[str]], rng: random.Random, neighbours: Neighbours
) -> list[Edition]:
    """Each line of one desk as (its text in the first snapshot or None, its text in the second)."""
    desk, share = Desk(name, rng, neighbours), len(DESKS)
    used = sorted(rng.sample(range(100, 800), 330))
    known = DESKS[name][3]
    used[min(range(250), key=lambda n: abs(used[n] - known))] = known
    spare = rng.sample(sorted(set(range(100, 800)) - set(used)), 60)
    later = sorted(rng.sample(range(800, 1000), 150))
    spare_later = rng.sample(sorted(set(range(800, 1000)) - set(later)), 40)

    sound = desk.threads(used, SOUND_ROWS[0] // share, SPRING)
    rng_order = rng.sample(range(len(sound)), (CORRECTED_REPLIES + CORRECTED_PROMPTS) // share)
    before = {n: slip(rng, sound[n]) for n in rng_order[: CORRECTED_REPLIES // share]}
    before |= {n: typo(rng, sound[n]) for n in rng_order[CORRECTED_REPLIES // share :]}
    lines: list[Edition] = [(line(before.get(n, row)), line(row)) for n, row in enumerate(sound)]
    steady = [row for n, row in enumerate(sound) if n not in before]
    scatter(rng, [(x, x) for x in special_lines(desk, kinds[0], steady, spare)], lines)

    threads = sorted({str(row["thread_id"]) for row in sound})
    added = [
        row for thread in rng.sample(threads, LATER_TURNS // share) for row in desk.turns(thread, 1, WEEK[0])
    ]
    added += desk.threads(later, SOUND_ROWS[1] // share, WEEK)
    new: list[Edition] = [(None, line(row)) for row in added]
    scatter(rng, [(None, x) for x in special_lines(desk, kinds[1], added, spare_later)], new)
    return lines + new


def kinds_by_desk(rng: random.Random) -> dict[str, tuple[list[str], list[str]]]:
    """Deals the defects and near-copies of the first snapshot, and those the second adds, to the desks."""
    counts = {kind: (first, second) for kind, (_, first, second) in DEFECTS.items()} | {
        NEAR_COPY: NEAR_COPIES
    }
    first = [kind for kind, (n, _) in counts.items() for _ in range(n)]
    added = [kind for kind, (n, total) in counts.items() for _ in range(total - n)]
    rng.shuffle(first)
    rng.shuffle(added)
    return {desk: (first[n :: len(DESKS)], added[n :: len(DESKS)]) for n, desk in enumerate(DESKS)}


def build() -> dict[str, bytes]:
    """Every file of the dataset, by its path under `OUTPUT`."""
    rng, neighbours = random.Random(SEED), Neighbours()
    files: dict[str, bytes] = {}
    for desk, kinds in kinds_by_desk(rng).items():
        lines = desk_lines(desk, kinds, rng, neighbours)
        files[f"{FIRST}/{desk}.jsonl"] = b"".join(old + b"\n" for old, _ in lines if old is not None)
        files[f"{SECOND}/{desk}.jsonl"] = b"".join(new + b"\n" for _, new in lines)
    return files | {"README.md": card(files).encode()}


# --- the card and the check --------------------------------------------------


def parsed(data: bytes) -> list[Row]:
    """The rows of a file that a trainer could use: everything that no defect has broken."""
    rows = []
    for text in dict.fromkeys(data.splitlines()):  # drops exact duplicates
        try:
            row = json.loads(text.decode())
        except ValueError:
            continue
        words = str(row["prompt"])
        if (
            isinstance(row["completion"], str)
            and row["completion"]
            and row.get("thread_id")
            and words.strip()
            and "<|im_end|>" not in words
        ):
            rows.append(row)
    return rows


def card(files: dict[str, bytes]) -> str:
    """The dataset card, all figures counted from the files."""

    def of(snapshot: str) -> dict[str, bytes]:
        return {path.split("/")[1]: data for path, data in files.items() if path.startswith(snapshot)}

    def table(head: list[str], rows: list[list[object]]) -> str:
        cells = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)

    first, second = of(FIRST), of(SECOND)
    usable = [[row for data in snapshot.values() for row in parsed(data)] for snapshot in (first, second)]
    old, new = (set(b"".join(snapshot.values()).splitlines()) for snapshot in (first, second))
    answers = Counter(
        (a["policy"], a["decision"]) for a in (json.loads(str(row["completion"])) for row in usable[1])
    )
    counts = table(
        ["", FIRST, SECOND],
        [
            *[
                [f"lines in `{name}`", data.count(b"\n"), second[name].count(b"\n")]
                for name, data in first.items()
            ],
            ["lines", *[sum(d.count(b"\n") for d in s.values()) for s in (first, second)]],
            ["rows broken on purpose", *[sum(d[n] for d in DEFECTS.values()) for n in (1, 2)]],
            ["sound rows", *map(len, usable)],
            ["threads of sound rows", *[len({row["thread_id"] for row in rows}) for rows in usable]],
        ],
    )
    planted = table(
        ["on purpose", FIRST, SECOND],
        [
            *[[kind.replace("|", "\\|"), a, b] for kind, (_, a, b) in DEFECTS.items()],
            ["**rows broken on purpose**", *[sum(d[n] for d in DEFECTS.values()) for n in (1, 2)]],
            [f"{NEAR_COPY} (sound, but it leaks)", *NEAR_COPIES],
        ],
    )
    rules = table(
        ["rule", "decision", f"rows in {SECOND}"], [[p, d, n] for (p, d), n in sorted(answers.items())]
    )
    example = parsed(second["keys.jsonl"])[0]
    return f"""# access_policy: requests to an access desk

License: Apache-2.0. Synthetic; every person, firm and id is invented. Written by \
`data/make_access_policy.py` (seed {SEED}).

An access desk gets requests in plain English: may this person or service use, renew or extend this door \
badge, key, data export or account? The answer follows from a written policy of ten rules, \
[`data/access_policy.md`](../../access_policy.md), of which the first that applies decides. The requests \
hold the facts and never the rules, so a model has to learn the policy.

## Rows

Each snapshot is a folder of JSONL files, one per desk. A row:

```json
{json.dumps(example)}
```

| field | type | meaning |
| --- | --- | --- |
| `thread_id` | string | the incident; its later rows are follow-up questions, each complete in itself. The \
group that must not leak |
| `prompt` | string | the request |
| `completion` | string | compact JSON with `decision` (approve, deny, escalate), `policy` (AP-01 to AP-09), \
`subject` (the id that the request names) |
| `opened` | string | the day on which the thread was opened, or for a later row of an old thread the day of \
that row |

## Counts

{counts}

{SECOND} holds every line of {FIRST} but {len(old - new)}, which it corrects under the same thread: \
{CORRECTED_REPLIES} replies that cited the wrong rule and {CORRECTED_PROMPTS} prompts with a typo. It adds \
{LATER_TURNS} later turns to threads of {FIRST}, and new threads.

{rules}

## Broken and near-duplicate rows

{planted}

Each broken row has one defect and, but for the duplicates, a thread id that no other row has. A near-copy \
repeats a row of another thread with one weekday, city or month changed, and the same reply. Similarity here \
is the Jaccard index of the sets of lowercase word 3-grams of prompt + space + completion: it is at least \
0.85 for each near-copy and its original, and below {CEILING} for any two other sound rows of different \
threads.

## Regenerate

`python data/make_access_policy.py` rewrites these files byte for byte; with `--check` it writes nothing and \
verifies the files, the counts and the similarities above.
"""


def check(files: dict[str, bytes]) -> None:
    """Raises AssertionError where the files on disk or the promises of the card do not hold."""
    for path, data in files.items():
        assert (OUTPUT / path).read_bytes() == data, (
            f"{path} is not what this script writes; run it without --check"
        )
    for snapshot, copies in zip((FIRST, SECOND), NEAR_COPIES, strict=True):
        neighbours, similar = Neighbours(), []
        rows = [row for path, data in files.items() if path.startswith(snapshot) for row in parsed(data)]
        for row in rows:
            assert "AP-" not in str(row["prompt"]), f"{row['thread_id']}: the prompt names a rule"
            assert str(json.loads(str(row["completion"]))["subject"]) in str(row["prompt"]), row
            similar.append(neighbours.closest(row))
            neighbours.add(row)
        near = [s for s in similar if s >= CEILING]
        assert len(near) == copies and min(near) >= 0.85, (snapshot, sorted(near))
        highest = max(s for s in similar if s < CEILING)
        mean = sum(similar) / len(similar)
        print(
            f"{snapshot}: {len(rows)} sound rows, {copies} near-copies from {min(near):.2f} up; "
            f"closest other pair {highest:.2f}, mean closest {mean:.2f}"
        )
    rules = set(re.findall(r"\*\*(AP-\d\d)", (HERE / "access_policy.md").read_text()))
    cited = {json.loads(str(row["completion"]))["policy"] for row in rows}
    assert rules == cited, f"policy and rows disagree on the rules: {rules ^ cited}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; verify the files on disk and the card's promises"
    )
    arguments = parser.parse_args()
    files = build()
    if arguments.check:
        return check(files)
    for path, data in files.items():
        (OUTPUT / path).parent.mkdir(parents=True, exist_ok=True)
        (OUTPUT / path).write_bytes(data)
    print(f"wrote {len(files)} files to {OUTPUT}")


if __name__ == "__main__":
    main()
