"""Why a row is rejected when it is tokenized: the values that rejects.parquet holds, and what they mean.

docs/reasons.md is the same list for users, and a test compares the two.
"""

from enum import StrEnum


class Reason(StrEnum):
    """The reasons, each with what it means in `MEANING`."""

    CONTROL_TOKEN_IN_TEXT = "control_token_in_text"
    FIELD_NOT_RENDERED = "field_not_rendered"
    TEMPLATE_ERROR = "template_error"
    NO_FINAL_ASSISTANT = "no_final_assistant"
    PROMPT_NOT_PREFIX = "prompt_not_prefix"
    COMPLETION_NOT_RENDERED = "completion_not_rendered"
    EMPTY_PROMPT = "empty_prompt"
    NOTHING_SUPERVISED = "nothing_supervised"
    CONTROL_TOKEN_MISMATCH = "control_token_mismatch"
    MASK_DISAGREEMENT = "mask_disagreement"
    DECODE_MISMATCH = "decode_mismatch"
    NO_ROOM_FOR_COMPLETION = "no_room_for_completion"
    TOO_LONG = "too_long"


MEANING = {
    Reason.CONTROL_TOKEN_IN_TEXT: (
        "the text holds a control token of this tokenizer literally, which would forge a turn"
    ),
    Reason.FIELD_NOT_RENDERED: (
        "the template leaves out something that the row says; the detail names the field. Choose a template "
        "that writes it, or name the field in template.ignore"
    ),
    Reason.TEMPLATE_ERROR: "the chat template refused the conversation",
    Reason.NO_FINAL_ASSISTANT: "the last message is not the assistant's, so there is nothing to learn",
    Reason.PROMPT_NOT_PREFIX: (
        "the rendered row does not begin with the prompt that a server would send (the template renders "
        "earlier turns differently)"
    ),
    Reason.COMPLETION_NOT_RENDERED: "the template drops or alters the completion, or repeats it",
    Reason.EMPTY_PROMPT: "the prompt has no token",
    Reason.NOTHING_SUPERVISED: "no token carries loss (all weights are 0, or no turn qualifies)",
    Reason.CONTROL_TOKEN_MISMATCH: "the control tokens in the ids are not those that the template placed",
    Reason.MASK_DISAGREEMENT: "character offsets and token prefix lengths give different masks",
    Reason.DECODE_MISMATCH: "decoding the supervised tokens does not give back their text",
    Reason.NO_ROOM_FOR_COMPLETION: "the prompt alone fills max_length",
    Reason.TOO_LONG: "the row is longer than max_length",
}


class Rejected(Exception):
    """A row that cannot be used, and why."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail or MEANING[reason])
        self.reason = reason
        self.detail = detail
