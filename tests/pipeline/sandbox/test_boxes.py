"""A box is chosen by a word."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from hermes_pipeline.cli import serving
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox import Bubblewrap, Container, choose_box
from hermes_pipeline.services.sandbox.boxes import CHOICES
from hermes_pipeline.services.sandbox.remote import Remote


def test_a_box_is_chosen_by_a_word() -> None:
    assert isinstance(choose_box("bubblewrap")(0), Bubblewrap)
    assert isinstance(choose_box("docker")(0), Container)
    assert isinstance(choose_box("podman:host/python:3.12@sha256:0")(1), Container)
    assert isinstance(choose_box("http://localhost:8090/")(2), Remote)
    for word in ("", "dockers", "file:///tmp"):
        with pytest.raises(UserError, match="there is no box"):
            choose_box(word)


def test_help_and_refusal_name_the_same_boxes() -> None:
    (option,) = get_type_hints(serving.sandbox, include_extras=True)["box"].__metadata__
    assert option.help.startswith(CHOICES)
