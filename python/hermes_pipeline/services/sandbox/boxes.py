"""One way to choose a box: by a word on the command line or in a recipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox.bubblewrap import Bubblewrap
from hermes_pipeline.services.sandbox.container import ENGINES, IMAGE, Container
from hermes_pipeline.services.sandbox.jobs import Box, Limits
from hermes_pipeline.services.sandbox.pool import Sandbox

CHOICES = "bubblewrap, docker, podman, docker:IMAGE, podman:IMAGE, or http://HOST:PORT"


def choose_box(spec: str) -> Callable[[int], Box]:
    """What makes the box of a slot.

    Args:
        spec: bubblewrap, docker or podman, one of these two with the name of an image after a
            colon, or the address of `hermes4 sandbox`.

    Raises:
        UserError: it is none of them.
    """
    if spec == "bubblewrap":
        return Bubblewrap
    if spec.startswith(("http://", "https://")):
        from hermes_pipeline.services.sandbox.remote import Remote  # aiohttp, for its users alone

        return partial(Remote, url=spec)
    engine, _, image = spec.partition(":")
    if engine in ENGINES:
        return partial(Container, engine=engine, image=image or IMAGE)
    raise UserError(f"there is no box {spec!r}; choose {CHOICES}")


def open_sandbox(
    spec: str = "bubblewrap", *, workers: int | None = None, limits: Limits | None = None
) -> Sandbox:
    """A sandbox of chosen boxes, for an `async with` block.

    Args:
        spec: as `choose_box` takes it.
        workers: jobs at a time; one for each core of this machine if None.
        limits: of a run that brings none.

    Raises:
        UserError: there is no such box, or it cannot run here.
    """
    return Sandbox(workers=workers, limits=limits, make_box=choose_box(spec))
