"""Function calls and tools of a row, in the common form and spelled as in the row."""

from typing import Any

from sft_pipeline.stages.validated_rows.normalized_row import MISSING, NO_VALUE, NormalizedRow
from sft_pipeline.tables import literal_json
from sft_pipeline.tables.reasons import RejectReason


def _parsed(value: Any) -> Any:
    """JSON that may be given as text; None where it is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return literal_json.loads(value)
    except (ValueError, RecursionError):
        return None


def _as_spelled(value: Any, otherwise: RejectReason, to: NormalizedRow) -> str | None:
    """JSON text. What comes from JSON in JSON may hold half a surrogate pair, or be too deep to write."""
    try:
        text = literal_json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except (UnicodeEncodeError, RecursionError):
        to.reject(otherwise)
        return None
    return text


def tool_calls_of(calls: list[Any], to: NormalizedRow) -> str | None:
    """Calls in the common form [{type: function, function: {name, arguments}}], as JSON text.

    A call that has this form stays as it is; {name, arguments} alone is put into it.
    """
    found: list[dict[str, Any]] = []
    for given in calls:
        parsed = _parsed(given)  # many datasets give calls as JSON text
        for call in parsed if isinstance(parsed, list) else [parsed]:
            wrapped = isinstance(call, dict) and isinstance(call.get("function"), dict)
            function = call["function"] if wrapped else call
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                to.reject(RejectReason.INVALID_TOOL_CALL)
                return None
            key = "arguments" if "arguments" in function else "parameters"
            arguments = function.get(key)
            if arguments is None or arguments in ("", "null"):
                arguments = {}
            if not isinstance(_parsed(arguments), dict):
                to.reject(RejectReason.INVALID_TOOL_CALL)
                return None
            if wrapped:
                kept = {k: v for k, v in function.items() if k != "parameters"}
                found.append({**call, "function": {**kept, "arguments": arguments}})
            else:
                entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
                if isinstance(call.get("id"), str):
                    entry["id"] = call["id"]
                found.append(entry)
    return _as_spelled(found, RejectReason.INVALID_TOOL_CALL, to)


def tools_of(value: Any, functions: Any, to: NormalizedRow) -> str | None:
    """The tools that the row declares, in the common form, as JSON text; None where there are none.

    Args:
        value: A list, one tool, JSON text of either, or a list of such texts.
        functions: What stands under the older name; it counts where there is no value.
    """
    if value is MISSING or value in NO_VALUE:
        value = functions
    if value is MISSING or value in NO_VALUE:
        return None
    parsed = _parsed(value)
    tools = [_parsed(tool) for tool in (parsed if isinstance(parsed, list) else [parsed])]
    if not all(isinstance(tool, dict) and tool for tool in tools):
        to.reject(RejectReason.INVALID_TOOLS)
        return None
    declared = [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
        for tool in tools
    ]
    return _as_spelled(declared, RejectReason.INVALID_TOOLS, to)
