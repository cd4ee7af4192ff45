"""Which text of a rendered conversation is the template's, and which is the messages', without looking for it.

A template is rendered once with message contents that remember where they are put, and that note every question the
template asks about them ("does it contain </think>?"). The result holds for every other conversation with the same
roles whose contents answer those questions alike: it need not be rendered, its parts are known. A template that does
more with a content than place it, ask about it, or trim white space that is not there, is not traced.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame

from sft_pipeline.text.template import MARKS, ChatTemplate, new_environment


class Untraceable(BaseException):
    """The template does with a content what cannot be traced. Not an Exception: templates must not swallow it."""


_QUESTIONS = ("startswith", "endswith", "__contains__", "__eq__", "__ne__", "strip", "lstrip", "rstrip")
_ASK: dict[str, Callable[..., Any]] = {name: getattr(str, name) for name in _QUESTIONS}


@dataclass(frozen=True)
class Question:
    """What a template asked about a message's content, and the answer.

    Attributes:
        message: Index of the message.
        ask: Name of the str method ("startswith", "__contains__", ...).
        arguments: Its arguments.
        answer: What it gave. For trimming, the content itself: nothing was trimmed.
    """

    message: int
    ask: str
    arguments: tuple[Any, ...]
    answer: bool | None

    def holds(self, content: str) -> bool:
        """Whether another content gives the same answer."""
        found = _ASK[self.ask](content, *self.arguments)
        return found == content if self.answer is None else found is self.answer

    def holds_for(self, contents: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Whether each of many contents, none of them empty, gives the same answer."""
        asked = self.arguments[0] if len(self.arguments) == 1 else None
        if self.ask in _ASK_ALL and isinstance(asked, str):
            found = _ASK_ALL[self.ask](contents, asked).to_numpy(zero_copy_only=False)
            return found == self.answer
        if self.answer is None and (asked is None or (isinstance(asked, str) and asked.isascii())):
            holds = np.ones(len(contents), dtype=bool)
            open_ = _edges_in(contents, _WHITE if asked is None else asked)
        else:
            holds = np.zeros(len(contents), dtype=bool)
            open_ = np.arange(len(contents))
        holds[open_] = [self.holds(c) for c in contents.take(pa.array(open_)).to_pylist()]
        return holds


_ASK_ALL: dict[str, Callable[[pa.StringArray, str], pa.BooleanArray]] = {
    "startswith": lambda contents, text: pc.starts_with(contents, text),
    "endswith": lambda contents, text: pc.ends_with(contents, text),
    "__contains__": lambda contents, text: pc.match_substring(contents, text),
    "__eq__": lambda contents, text: pc.equal(contents, text),
    "__ne__": lambda contents, text: pc.not_equal(contents, text),
}
_WHITE = "".join(chr(c) for c in range(128) if chr(c).isspace())


def _edges_in(contents: pa.StringArray, characters: str) -> npt.NDArray[np.int64]:
    """The contents of which trimming these (ASCII) characters, or white space beyond ASCII, may take something away."""
    trimmed = np.array([chr(c) in characters for c in range(128)] + [True] * 128)
    _, offsets, data = contents.buffers()
    at = np.frombuffer(offsets, np.int32)[contents.offset : contents.offset + len(contents) + 1]
    octets = np.frombuffer(data, np.uint8)
    return np.flatnonzero(trimmed[octets[at[:-1]]] | trimmed[octets[at[1:] - 1]])


Part = str | int
"""A literal of the template, or the index of the message whose content stands there."""


@dataclass(frozen=True)
class Trace:
    """A rendered text as parts (no two literals are neighbours), and the questions on which it depends."""

    parts: tuple[Part, ...]
    questions: tuple[Question, ...]


class Tracer:
    """Traces one template.

    Raises:
        Untraceable: The template's source already rules it out.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        environment = _environment()
        tree = environment.parse(template.text)
        for operand in tree.find_all(nodes.Operand):
            if operand.op in ("in", "notin") and isinstance(operand.expr, nodes.Const):
                raise Untraceable("it looks for a content within a constant")
        self._compiled = environment.from_string(template.text)

    def trace(self, roles: Sequence[str], contents: Sequence[str], *, add_generation_prompt: bool) -> Trace:
        """The parts of a conversation's text.

        Raises:
            Untraceable: See there.
            jinja2.TemplateError: The template refuses the conversation.
        """
        asked: dict[Question, None] = {}
        messages = [
            {"role": role, "content": Placed(content, (i,), asked)}
            for i, (role, content) in enumerate(zip(roles, contents, strict=True))
        ]
        text = self._compiled.render(
            messages=messages,
            tools=[],
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._template.variables,
        )
        parts = tuple(_merged(text.parts if isinstance(text, Placed) else (text,)))
        # A content that the template read in a way that was not noticed would stand in a literal.
        if any(c in p for p in parts if isinstance(p, str) for c in contents):
            raise Untraceable("a content stands in the template's own text")
        return Trace(parts, tuple(asked))


def _merged(parts: Iterable[Part]) -> Iterator[Part]:
    literal = ""
    for part in parts:
        if isinstance(part, str):
            literal += part.translate(MARKS)
            continue
        if literal:
            yield literal
        literal = ""
        yield part
    if literal:
        yield literal


class Placed(str):
    """Text that remembers its parts. One that is a single content can be asked questions, which are noted."""

    parts: tuple[Part, ...]
    asked: dict[Question, None]

    def __new__(cls, value: str, parts: tuple[Part, ...], asked: dict[Question, None]) -> "Placed":
        self = super().__new__(cls, value)
        self.parts, self.asked = parts, asked
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> "Placed":
        return _together((self, other))

    def __radd__(self, other: str) -> "Placed":
        return _together((other, self))

    def __bool__(self) -> bool:
        return bool(self._ask("__ne__", ""))

    def _ask(self, name: str, *arguments: Any) -> Any:
        if len(self.parts) != 1 or any(isinstance(a, Placed) for a in arguments):
            raise Untraceable(f"{name} of text that is put together")
        answer = getattr(str, name)(self, *arguments)
        if answer is NotImplemented:  # compared with something that is no text
            return answer
        if isinstance(answer, str) and answer != str.__str__(self):
            raise Untraceable(f"{name} alters the content")
        (message,) = self.parts
        assert isinstance(message, int)
        self.asked[Question(message, name, arguments, None if isinstance(answer, str) else answer)] = None
        return self if isinstance(answer, str) else answer


def _together(parts: Iterable[Any]) -> Any:
    """Joined text; a Placed one if any of the parts is."""
    found = list(parts)
    placed = next((p for p in found if isinstance(p, Placed)), None)
    if placed is None:
        return "".join(found)
    pieces = [piece for p in found for piece in (p.parts if isinstance(p, Placed) else (p,))]
    return Placed("".join(str.__str__(p) for p in found), tuple(pieces), placed.asked)


def _question(name: str) -> Callable[..., Any]:
    def ask(self: Placed, *arguments: Any) -> Any:
        return self._ask(name, *arguments)

    return ask


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Placed, *arguments: Any, **named: Any) -> NoReturn:
        raise Untraceable(f"it uses {name} of a content")

    return refuse


_REFUSED = (
    "__hash__",
    "__iter__",
    "__getitem__",
    "__len__",
    "__mod__",
    "__rmod__",
    "__mul__",
    "__rmul__",
    "__format__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
)
for _name in _QUESTIONS:
    setattr(Placed, _name, _question(_name))
for _name in (*_REFUSED, *(n for n in dir(str) if not n.startswith("_") and n not in _QUESTIONS)):
    setattr(Placed, _name, _refusal(_name))


# -- the environment ----------------------------------------------------------------------------------------------

_LOOK_AT_ITEMS_ONLY = {
    "length",
    "count",
    "list",
    "first",
    "last",
    "selectattr",
    "rejectattr",
    "map",
    "reverse",
    "default",
    "d",
}
_ON_CONTENT = {"trim", "default", "d", "string"}
_KINDS = {
    "string",
    "iterable",
    "sequence",
    "mapping",
    "none",
    "defined",
    "undefined",
    "number",
    "boolean",
    "true",
    "false",
    "callable",
    "integer",
    "float",
}
_EQUAL = {"eq", "equalto", "==", "ne", "!="}


class _Generator(CodeGenerator):
    """Compiles `a ~ b` so that it goes through `environment.concat`."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for arg in node.nodes:
            self.write("str(")
            self.visit(arg, frame)
            self.write("), ")
        self.write("))")


def _environment() -> jinja2.Environment:
    environment = new_environment()
    environment.code_generator_class = _Generator
    environment.concat = _together  # type: ignore[method-assign, assignment]
    for name, function in environment.filters.items():
        environment.filters[name] = _guarded_filter(name, function)
    for name, function in environment.tests.items():
        environment.tests[name] = _guarded_test(name, function)  # type: ignore[arg-type]
    return environment


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the marks by which Jinja passes the context or the environment
    def guarded(*arguments: Any, **named: Any) -> Any:
        given = [*arguments, *named.values()]
        if any(isinstance(a, Placed) for a in given):
            if name not in _ON_CONTENT:
                raise Untraceable(f"it filters a content with {name}")
        elif name not in _LOOK_AT_ITEMS_ONLY and any(_holds_content(a) for a in given):
            raise Untraceable(f"it filters messages with {name}")
        return function(*arguments, **named)

    return guarded


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*arguments: Any) -> Any:
        if any(isinstance(a, Placed) for a in arguments):
            if name in _KINDS:
                return function(*("text" if isinstance(a, Placed) else a for a in arguments))
            if name not in _EQUAL:
                raise Untraceable(f"it tests a content with {name}")
        return function(*arguments)

    return guarded


def _holds_content(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_content, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_content, value))
    return isinstance(value, Placed)
