"""What a line asks to continue: a text, a chat, or token ids."""

import json
from typing import Any

from advance_step.generate.records import LineError, Message, excerpt


def take_content(entry: dict[str, Any], names: tuple[str, ...]) -> str | list[Message] | list[int]:
    """Take what is to be continued out of `entry`, which has it under one of `names`: "prompt", "messages"."""
    given = [name for name in names if entry.get(name) is not None]
    if len(given) != 1:
        raise LineError(f"expected {' or '.join(names)}, got {'both' if given else excerpt(json.dumps(entry))}")
    content = entry.pop(given[0])
    return _messages(content) if given == ["messages"] else _prompt(content)


def _prompt(content: Any) -> str | list[int]:
    if isinstance(content, str) and content:
        return content
    if isinstance(content, list) and content and all(isinstance(t, int) and not isinstance(t, bool) for t in content):
        return content
    raise LineError(f"prompt: expected a text that is not empty, or token ids, got {excerpt(content)}")


def _messages(content: Any) -> list[Message]:
    if not isinstance(content, list) or not content:
        raise LineError(f'messages: expected [{{"role": ..., "content": ...}}, ...], got {excerpt(content)}')
    return [_message(message) for message in content]


def _message(message: Any) -> Message:
    """With its text in one piece, as templates expect it: the parts of one in several are joined by newlines."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LineError(f'messages: expected {{"role": ..., "content": ...}}, got {excerpt(message)}')
    content = message.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise LineError(f"messages: expected content that is a text, got {excerpt(content)}")
    return message | {"content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
