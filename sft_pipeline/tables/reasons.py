"""Why a row is rejected before it is tokenized: the reasons in rejects.parquet and quarantine.parquet.

docs/reasons.md is the same list for users, and a test compares the two.
"""

from enum import StrEnum

MAX_LINE = 32 << 20  # bytes; a longer line is never in memory whole
MAX_DEPTH = 100  # levels of nested objects and lists


class RejectReason(StrEnum):
    """A reason and its one-line explanation."""

    explanation: str

    def __new__(cls, value: str, explanation: str) -> "RejectReason":
        member = str.__new__(cls, value)
        member._value_ = value
        member.explanation = explanation
        return member

    # raw_rows: what cannot be decoded.
    INVALID_UTF8 = "invalid_utf8", "the bytes are not UTF-8"
    INVALID_UNICODE = "invalid_unicode", "the text holds half of a surrogate pair, which no file can store"
    INVALID_JSON = "invalid_json", "the line is not JSON"
    NOT_AN_OBJECT = "not_an_object", "the line is JSON, but not an object with named fields"
    NOT_FINITE = "not_finite", "NaN or Infinity, which JSON does not have"
    DUPLICATE_KEY = "duplicate_key", "an object names the same key twice: which value counts is not defined"
    TOO_DEEP = "too_deep", f"nested more than {MAX_DEPTH} levels deep"
    LINE_TOO_LONG = (
        "line_too_long",
        f"longer than {MAX_LINE >> 20} MiB; only its beginning, length and SHA-256 are kept",
    )
    INVALID_CSV = "invalid_csv", "broken quoting in a CSV record"
    RAGGED_ROW = "ragged_row", "the record has another number of fields than the header"
    UNSUPPORTED_VALUE = (
        "unsupported_value",
        "a value of a type that JSON cannot hold, for example an interval of months",
    )

    # validated_rows: what the dataset file does to rows before they are read.
    NOT_SELECTED = (
        "not_selected",
        "`where` does not hold for the row, or `transform` leaves it out; it does not count as rejected",
    )
    NOT_RESHAPED = "not_reshaped", "`where` or `transform` failed on the row"
    NOT_JOINED = "not_joined", "the file that is joined has no row, or several, of this key"

    # validated_rows: the shape of the row.
    MISSING_FIELD = (
        "missing_field",
        "a field that the format needs is absent: map it with `columns`, or choose another format",
    )
    WRONG_TYPE = (
        "wrong_type",
        "a field holds another type than the format says, for example a number where text belongs",
    )
    UNSUPPORTED_CONTENT = "unsupported_content", "a message has a part that is not text, for example an image"
    INVALID_TOOLS = "invalid_tools", "`tools` is not a JSON list of objects"
    UNUSED_FIELD = (
        "unused_field",
        "a field that would change what is trained, and that nothing reads: map it with `columns`, or name "
        "it under the source's `unused`",
    )
    INVALID_TOOL_CALL = "invalid_tool_call", "a function call is not JSON with a name and arguments"

    # validated_rows: the contract.
    MISSING_GROUP = "missing_group", "no group key: the row could leak from one split into another"
    INVALID_TIME = "invalid_time", "no ISO date or time in the time column"
    ILLEGAL_ROLE = "illegal_role", "a role other than system, user, assistant, tool and their known aliases"
    ROLES_DO_NOT_ALTERNATE = (
        "roles_do_not_alternate",
        "the turns do not alternate: an optional system message, then user and assistant in turn, tool "
        "results after calls",
    )
    NO_FINAL_COMPLETION = (
        "no_final_completion",
        "the conversation does not end with the assistant: there is nothing to learn",
    )
    EMPTY_PROMPT = "empty_prompt", "the prompt is empty or white space"
    EMPTY_MESSAGE = "empty_message", "a turn before the last is empty or white space"
    EMPTY_COMPLETION = "empty_completion", "the completion is empty, null or white space"
    PROMPT_TOO_SHORT = "prompt_too_short", "the prompt has fewer characters than contract.min_prompt_chars"
    PROMPT_TOO_LONG = "prompt_too_long", "the prompt has more characters than contract.max_prompt_chars"
    COMPLETION_TOO_SHORT = (
        "completion_too_short",
        "the completion has fewer characters than contract.min_completion_chars",
    )
    COMPLETION_TOO_LONG = (
        "completion_too_long",
        "the completion has more characters than contract.max_completion_chars",
    )
    EXACT_DUPLICATE = "exact_duplicate", "the same group and messages as an earlier row, which is kept"

    # grouped_split.
    NEAR_DUPLICATE_OF_HELD_OUT = (
        "near_duplicate_of_held_out",
        "a near-duplicate of a row that is held out for validation or test; groups never move, so the row "
        "outside that split is dropped",
    )
