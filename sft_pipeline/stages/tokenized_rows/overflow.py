"""What happens to rows longer than max_length. Nothing here drops a whole answer.

reject           the row goes to rejects.parquet (`too_long`, or `no_room_for_completion`)
truncate_prompt  the oldest turns go first, then the beginning of the last question; the row is rendered
                 anew, so that its prompt is still exactly what a server would send for the shorter
                 conversation
truncate_answer  the end of the answer goes, with its stop token: nothing teaches the model to stop there
split            windows of max_length over the row, each with up to half a window of the text before it
                 as context; every supervised token has its label in exactly one of them

`reject` and `truncate_answer` reject a row whose prompt before the final turn fills max_length
(`no_room_for_completion`), also where earlier supervised turns would fit; so does `split` where only the
completion is supervised.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sft_pipeline.stages.tokenized_rows.rendering import Span
from sft_pipeline.text.conversation import Conversation
from sft_pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Cut:
    """Tokens start:stop of a row. Those before `new_from` are context that another window supervises."""

    start: int
    stop: int
    new_from: int = 0
    dropped_before: int = 0


def windows(loss: Sequence[Span], length: int, limit: int) -> list[Cut]:
    """Windows of at most `limit` tokens that supervise every supervised token once.

    The first one begins with the row, so that it holds the prompt that a server would send. A later one
    begins half a window before the first token that is not supervised yet.
    """
    cuts = [Cut(0, limit)]
    while (done := cuts[-1].stop) < loss[-1][1]:
        start = max(done - limit // 2, 0)
        cuts.append(Cut(start, min(start + limit, length), new_from=done))
    return [c for c in cuts if any(a < c.stop and b > max(c.start + 1, c.new_from) for a, b in loss)]


def shorten_prompt(given: Conversation, tokenizer: Tokenizer, excess: int) -> Conversation | None:
    """The conversation with less in front of its final turn; None where nothing more can be left out.

    System messages stay. While an earlier question can go (with its answers), the oldest one goes; then the
    last question loses tokens from its beginning.

    Args:
        excess: Tokens that are too many.
    """
    asked = [i for i, m in enumerate(given.messages) if m["role"] == "user"]
    if len(asked) > 1:
        keep = [i for i, m in enumerate(given.messages) if i >= asked[1] or m["role"] == "system"]
        messages = [given.messages[i] for i in keep]
        return replace(given, messages=messages, weights=[given.weights[i] for i in keep])
    if not asked:
        return None
    content = given.messages[asked[0]].get("content", "")
    offsets = tokenizer.encode_batch([content])[0].encoding.offsets
    if excess >= len(offsets):
        return None
    # Not offsets[excess] itself: where tokens share a character it may be 0, and nothing would be left out.
    begin = next((start for start, _ in offsets[excess:] if start > 0), len(content))
    shorter = content[begin:]
    if not shorter.strip():
        return None
    messages = list(given.messages)
    messages[asked[0]] = {**messages[asked[0]], "content": shorter}
    return replace(given, messages=messages)
