"""What a Gluon kernel runs on, for `gluon_simulator`: memory that remembers who touched it,
barriers with phases, copies and products that end when they please, roles that take turns at
random.

Two accesses of which one writes must be ordered by what the kernel waits for, whatever order this
run happened to take: every role, copy and product has a vector clock, a barrier hands clocks on,
and an access that does not know of an earlier one is a race. So a missing wait is found in any run.
Products end in the order in which they were asked for, as those of one thread do.

Not modelled: the four warps of a role, of which `bench.machine_code` sees that they meet before one
arrives for all, and the layouts of registers and of memory, which the compiler proves.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twins.interpreter import from_bits, to_bits

Clock = dict[str, int]
Area = tuple[int, int, int, int]  # slots from and to, bytes of a line from and to


class Fault(Exception):
    """The kernel does what hardware would punish."""


# What a fault says of memory that is read before it is ready, or overwritten while it is read.
TOO_EARLY = "may still|nothing has written|missed a phase|a phase ends before"


@dataclass(frozen=True)
class DType:
    """An element type as `gl` names it."""

    name: str
    storage: Any  # how NumPy keeps it in memory

    @property
    def size_bytes(self) -> int:
        return int(np.dtype(self.storage).itemsize)

    def rounded(self, values: NDArray[Any]) -> NDArray[Any]:
        """What is left of values once they have had this type."""
        return self.decode(self.encode(values))

    def encode(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.name == "bfloat16":
            return to_bits(values)
        return np.asarray(values).astype(self.storage, order="C")

    def decode(self, stored: NDArray[Any]) -> NDArray[Any]:
        if self.name == "bfloat16":
            return from_bits(stored)
        return stored.astype(np.float32) if self.name == "float16" else stored


def joined(*clocks: Clock) -> Clock:
    return {who: max(c.get(who, 0) for c in clocks) for who in {w for c in clocks for w in c}}


@dataclass(eq=False)
class Role:
    """One partition of the warps, as a thread that runs while it holds the turn."""

    name: str
    clock: Clock = field(default_factory=dict)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits_for: Callable[[], bool] | None = None
    about: str = ""
    done: bool = False
    stores: list[Event] = field(default_factory=list)  # asynchronous ones, not yet waited for

    def tick(self) -> None:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1


@dataclass(eq=False)
class Event:
    """Something asynchronous that will happen: ``after`` must have happened, if anything."""

    happen: Callable[[], None]
    after: Event | None = None
    happened: bool = False
    clock: Clock = field(default_factory=dict)


@dataclass
class Access:
    who: str
    time: int
    area: Area
    writes: bool


class Machine:
    """One program: its roles and what is in flight."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.roles = [Role("kernel")]
        self.current = self.roles[0]
        self.events: list[Event] = []
        self.last_product: Event | None = None
        self.tensor_clock: Clock = {}
        self.copies = 0
        self.control = threading.Semaphore(0)
        self.fault: BaseException | None = None
        self.memories: list[Memory] = []

    def specialize(self, functions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Run the roles until all have ended, taking turns with what is in flight."""
        parent = self.current
        self.roles = []
        for i, (function, arguments) in enumerate(functions):
            role = Role(f"{function.__name__}-{i}", dict(parent.clock))
            self.roles.append(role)
            threading.Thread(
                target=self._play, args=(role, function, arguments), daemon=True
            ).start()
        try:
            while any(not role.done for role in self.roles):
                self._step()
            if any(not event.happened for event in self.events):
                raise Fault("the program ends while copies or products are in flight")
        finally:
            self._release()
        parent.clock = joined(parent.clock, *(role.clock for role in self.roles))
        self.current = parent

    def _step(self) -> None:
        events = [e for e in self.events if not e.happened and (not e.after or e.after.happened)]
        able = [r for r in self.roles if not r.done and (r.waits_for is None or r.waits_for())]
        if not events and not able:
            waits = ", ".join(f"{r.name} for {r.about}" for r in self.roles if not r.done)
            raise Fault(f"deadlock: {waits}")
        chosen = self.random.choice([*events, *able])
        if isinstance(chosen, Event):
            chosen.happen()
            chosen.happened = True
            self.events.remove(chosen)
            return
        chosen.waits_for = None
        self.current = chosen
        chosen.turn.release()
        self.control.acquire()
        if self.fault:
            raise self.fault

    def _play(self, role: Role, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        role.turn.acquire()
        try:
            if not self.fault:
                function(*arguments)
                if role.stores:
                    raise Fault(f"{role.name} ends before its stores have read shared memory")
        except BaseException as fault:
            self.fault = self.fault or fault
        role.done = True
        self.control.release()

    def _release(self) -> None:
        """Let the threads of a run that failed end."""
        for role in self.roles:
            if not role.done:
                self.fault = self.fault or Fault("stopped")
                role.turn.release()

    def pause(self, until: Callable[[], bool] | None = None, about: str = "") -> None:
        """Let others go on, until ``until``."""
        role = self.current
        if role.name == "kernel":
            if until is not None and not until():
                raise Fault(f"deadlock: the kernel waits for {about} before its roles begin")
            return
        role.waits_for, role.about = until, about
        self.control.release()
        role.turn.acquire()
        if self.fault:
            raise Fault("stopped")

    def copy(self, happen: Callable[[Clock], None]) -> tuple[Event, str]:
        """A copy that ends at any time, with its own clock and name."""
        self.copies += 1
        name = f"copy-{self.copies}"
        clock = {**self.current.clock, name: 1}
        event = Event(lambda: happen(clock), clock=clock)
        self.events.append(event)
        return event, name

    def product(self, happen: Callable[[Clock], None]) -> Clock:
        """Something the tensor cores do after all they were given before."""
        self.tensor_clock = joined(self.tensor_clock, self.current.clock)
        self.tensor_clock["tensor"] = self.tensor_clock.get("tensor", 0) + 1
        clock = dict(self.tensor_clock)
        self.last_product = Event(lambda: happen(clock), after=self.last_product, clock=clock)
        self.events.append(self.last_product)
        return clock

    def fence(self) -> None:
        """What this role wrote to shared memory becomes visible to copies and products."""
        for memory in self.memories:
            memory.unfenced = [a for a in memory.unfenced if a.who != self.current.name]


class Memory:
    """One allocation of shared or tensor memory, full of NaN, and who touched which part when."""

    def __init__(self, machine: Machine, shape: tuple[int, ...], kind: DType, space: str) -> None:
        lines = (
            shape
            if len(shape) == 3
            else (1, *shape)
            if space == "tensor"
            else (shape[0], 1, shape[1])
        )
        self.bytes = np.full((lines[0], lines[1], lines[2] * kind.size_bytes), 0xFF, np.uint8)
        self.machine, self.space = machine, space
        self.accesses: list[Access] = []
        self.unfenced: list[Access] = []
        machine.memories.append(self)

    def touch(self, area: Area, clock: Clock, who: str, *, writes: bool) -> None:
        """Note an access, or raise where an earlier one is not known to it."""
        whole = [a for a in self.accesses if overlap(a.area, area)]
        if not writes and not any(a.writes for a in whole):
            raise Fault(f"{who} reads {self.space} memory that nothing has written")
        for one in whole:
            if (writes or one.writes) and clock.get(one.who, 0) < one.time:
                how = "overwrites what" if writes else "reads what"
                raise Fault(f"{who} {how} {one.who} may still {'write' if one.writes else 'read'}")
        synchronous = who == self.machine.current.name
        if not synchronous and any(overlap(a.area, area) for a in self.unfenced):
            raise Fault(f"{who} touches what was written to shared memory without a fence")
        access = Access(who, clock[who], area, writes)
        self.accesses = [
            a
            for a in self.accesses
            if not (inside(a.area, area) and (writes or (a.who == who and not a.writes)))
        ]
        if writes and synchronous and self.space == "shared":
            self.unfenced.append(access)
        self.accesses.append(access)


def overlap(a: Area, b: Area) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def inside(a: Area, b: Area) -> bool:
    return b[0] <= a[0] and a[1] <= b[1] and b[2] <= a[2] and a[3] <= b[3]


class Barrier:
    """An mbarrier: a phase ends once all have arrived and all bytes have come."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.count = self.pending = self.bytes = self.phase = 0
        self.gathered: Clock = {}
        self.known: list[Clock] = []  # of each phase that has ended
        self.expected: dict[str, int] = {}  # by role: the phase it waits for next
        self.hosts: set[str] = set()  # roles that wait for room, of which there was some before

    def start(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, clock: Clock, count: int = 1, bytes: int = 0) -> None:
        if self.count == 0:
            raise Fault(f"{self.name} was not initialised")
        if self.pending < count:
            raise Fault(f"{self.name}: more arrivals than it counts")
        self.pending -= count
        self.bytes += bytes
        self.gather(clock)

    def gather(self, clock: Clock, bytes: int = 0) -> None:
        self.gathered = joined(self.gathered, clock)
        self.bytes -= bytes
        if self.pending or self.bytes:
            return
        late = [who for who, phase in self.expected.items() if 0 <= phase < self.phase]
        if late:
            raise Fault(f"{self.name}: a phase ends before {late[0]} has seen the one before")
        self.known.append(self.gathered)
        self.phase, self.pending, self.gathered = self.phase + 1, self.count, {}

    def wait(self, parity: int) -> None:
        role = self.machine.current
        phase = self.expected.get(role.name, -1 if parity else 0)
        if parity not in (0, 1) or phase & 1 != parity:
            raise Fault(f"{role.name} waits for the same phase of {self.name} again")
        if self.phase > phase + 1:
            raise Fault(f"{role.name} missed a phase of {self.name}")
        if phase < 0:
            self.hosts.add(role.name)
        self.expected[role.name] = phase
        self.machine.pause(lambda: self.phase > phase, f"{self.name}, phase {phase}")
        self.expected[role.name] = phase + 1
        if phase >= 0:
            role.clock = joined(role.clock, self.known[phase])

    def end(self) -> None:
        """After a program that might have taken one tile more: all room must be free again."""
        for who in self.hosts:
            if self.phase <= self.expected[who]:
                raise Fault(f"deadlock: with one tile more {who} would wait for {self.name}")
