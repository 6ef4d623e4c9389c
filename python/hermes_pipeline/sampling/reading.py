"""Conversations out of records; what is none is set aside, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from hermes_pipeline.chat import Refused, parse_json, parse_prompt
from hermes_pipeline.records import Conversation, Message
from hermes_pipeline.sampling.draw import as_input
from hermes_pipeline.services.files import Record, quarantine_entry, without_numbers
from hermes_pipeline.services.store import Input


class Reading:
    """The conversations of some records, read once.

    Args:
        quarantine: takes what is said of a record that is no conversation, with its number.
        system: the system message of conversations that have none.
    """

    def __init__(
        self,
        records: Iterable[Record],
        quarantine: Callable[[Mapping[str, Any]], object],
        system: str | None,
    ) -> None:
        self.read = self.quarantined = 0
        self.reasons: Counter[str] = Counter()
        self._records, self._quarantine = records, quarantine
        self._system = () if system is None else (Message("system", system),)

    def inputs(self) -> Iterator[tuple[Input, Conversation] | None]:
        """Every conversation, by its place; None for a record that is none."""
        for record in self._records:
            self.read += 1
            entry = None
            try:
                conversation = self._parse(record)
                entry = as_input(self.read, conversation), conversation
            except Refused as error:
                self._set_aside(record, str(error).encode("utf-8", "replace").decode())
            yield entry

    def _parse(self, record: Record) -> Conversation:
        if record.error is not None:
            raise Refused(record.error)
        data = parse_json(record.data) if isinstance(record.data, bytes) else record.data
        conversation = parse_prompt(data, record.source)
        if conversation.messages[0].role == "system":
            return conversation
        return replace(conversation, messages=self._system + conversation.messages)

    def _set_aside(self, record: Record, reason: str) -> None:
        self.quarantined += 1
        self.reasons[without_numbers(reason)] += 1
        self._quarantine(quarantine_entry(record, reason) | {"number": self.read})
