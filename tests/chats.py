"""Messages, a tool call and a broken text that several tests of conversations share."""

from __future__ import annotations

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
HALF = "\ud83d"  # half of a surrogate pair, as JSON can hold it
