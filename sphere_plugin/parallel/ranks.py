"""This process among those that share a run, and what it exchanges with them.

Exchanges keep them in step. Everyone tells in each what it is about, and whether the work before it went well: an
error on one rank is raised on all, and ranks that are not at the same point end the run instead of mixing up their
numbers. For a single process (`ALONE`) nothing of this happens.
"""

from __future__ import annotations

import functools
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Concatenate, Final, NoReturn, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sphere_plugin.errors import ConfigError, RanksError, SphereError
from sphere_plugin.models.memory import cut, work_through
from sphere_plugin.parallel.environment import log_name

_ROWS: Final = torch.contiguous_format
_END: Final = "end"
_LOOK: Final = 0.1  # seconds between two looks for an order, once it is long in coming
RESUME: Final = "`sphere run --resume DIR` goes on after the last batch, with any number of processes."

T = TypeVar("T")
Row = TypeVar("Row")
P = ParamSpec("P")


class Ranks:
    """This process among those that share a run.

    Args:
        rank: its number.
        size: how many there are.
        local: its number on this machine.
        store: torch's, which all of them see.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.local = rank, size, local
        self._store = store
        self._orders = 0
        self._told: BaseException | None = None  # the last error that all ranks know of

    @property
    def is_main(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def device(self, given: Any) -> Any:
        """The device of this process for one that a YAML names: the CPU for all of them, or to each its own GPU.

        Raises:
            ConfigError: there are fewer GPUs than processes on this machine.
        """
        if self.size == 1 or str(given) == "cpu":
            return given
        count = torch.cuda.device_count()
        if self.local >= count:
            remedy = "Start as many processes as there are GPUs (--nproc-per-node), or write device: cpu."
            raise ConfigError("device", f"{count} GPUs", f"one for process {self.local} of this machine", remedy)
        return self.local

    # ---- work that is shared ----

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of ``items``: a stretch of them, none longer than another by more than one item."""
        each, more = divmod(len(items), self.size)
        first = self.rank * each + min(self.rank, more)
        return items[first : first + each + (self.rank < more)]

    def keeper(self, number: int) -> int:
        """The rank that keeps what belongs to layer ``number`` of those that are edited, from 0."""
        return number % self.size

    def each(self, what: str, work: Callable[[], T]) -> list[T]:
        """Do ``work`` on every rank; returns what each has returned, in their order.

        Args:
            what: it is, the same on all ranks.
            work: may use exchanges itself. Tensors in what it returns come back on the CPU, contiguous, to all alike.

        Raises:
            SphereError: one that the work has raised, on this rank or another.
            RanksError: the work failed otherwise on another rank, or one is lost.
        """
        if self.size == 1:
            return [work()]
        try:
            value = _packed(work())
        except RanksError:
            raise
        except Exception as error:
            if error is self._told:
                raise
            self._fail(what, error)
        return self._exchange(what, value)

    def by(self, rank: int, what: str, work: Callable[[], T]) -> T:
        """Do ``work`` on one rank; returns on all what it has returned there. Raises as `each`."""
        if self.size == 1:
            return work()
        found: list[Any] = self.each(what, lambda: work() if rank == self.rank else None)
        result: T = found[rank]
        return result

    def together(self, what: str, work: Callable[[], T]) -> T:
        """Do ``work`` on every rank; returns what it has returned on this one, once all are done. Raises as `each`."""
        result: list[T] = []
        self.each(what, lambda: result.append(work()))
        return result[0]

    def through(
        self,
        what: str,
        rows: Sequence[Row],
        length: Callable[[Row], int],
        budget: int,
        work: Callable[[Sequence[Row]], Sequence[T]],
        progress: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> Iterator[tuple[Row, T]]:
        """`work_through` in the pieces that one process would make, which the ranks take in turn.

        Results are those of one process, bit for bit where a piece's result depends on nothing but the piece.

        Args:
            what: it is.
            rows, length, budget: see `work_through`.
            work: returns a result for each row.
            progress: told the rows that are done, on rank 0.

        Yields:
            A row and its result, in no particular order.
        """
        if self.size == 1:
            for piece, done in work_through(rows, length, budget, work):
                progress(piece)
                yield from zip(piece, done, strict=True)
            return
        pieces = cut(rows, length, budget)

        def own() -> list[T]:
            found: list[T] = []
            for number in range(self.rank, len(pieces), self.size):
                for _, done in work_through(pieces[number], length, budget, work):
                    found += done
                if self.is_main:
                    progress([row for piece in pieces[number : number + self.size] for row in piece])
            return found

        for rank, found in enumerate(self.each(what, own)):
            mine = [row for piece in pieces[rank :: self.size] for row in piece]
            yield from zip(mine, found, strict=True)

    # ---- tensors ----

    def same(self, what: str, tensor: Tensor) -> Tensor:
        """Rank 0's ``tensor``, on the device of this rank's; shapes and dtypes are the same on all ranks."""
        if self.size == 1:
            return tensor
        self._exchange(what, None)
        given = tensor.detach()
        shared = given.contiguous() if self.is_main else torch.empty_like(given, memory_format=_ROWS)
        flat = shared.view(-1).view(torch.uint8)  # no backend knows all dtypes
        self._guarded(what, lambda: dist.broadcast(flat, 0))
        return shared

    def total(self, what: str, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on rank 0; elsewhere the result has no meaning. ``tensor`` stays as it is."""
        if self.size == 1:
            return tensor
        self._exchange(what, None)
        summed = tensor.detach().clone(memory_format=_ROWS)
        self._guarded(what, lambda: dist.reduce(summed, 0))
        return summed

    def agree(self, what: str, value: str, expected: str, remedy: str) -> None:
        """Raise RanksError on all ranks unless they have the same ``value``."""
        if self.size == 1:
            return
        told = self._exchange(what, value)
        for rank, other in enumerate(told):
            if other != told[0]:
                raise self._known(RanksError(f"{what} on rank {rank}", other, f"{expected}, {told[0]}", remedy))

    # ---- orders ----

    def order(self, name: str, *arguments: Any, **named: Any) -> None:
        """Tell all other ranks to call the method ``name`` now; nothing on them."""
        if self.size == 1 or not self.is_main:
            return
        key = self._next()
        self._guarded("an order", lambda: self._of_store().set(key, ""))
        self._exchange("an order", (name, _packed(arguments), _packed(named)))
        with suppress(RuntimeError):
            self._of_store().delete_key(key)

    def follow(self, begin: Callable[..., Any], log: Callable[[Exception], None]) -> None:
        """What a rank other than 0 does: as it is told, until rank 0 ends it.

        Args:
            begin: what the order "begin" calls; it returns the object whose methods other orders call.
            log: told about errors, which rank 0 knows as well.
        """
        crew: Any = None
        while True:
            self._await(self._next())
            name, arguments, named = self._exchange("an order", None)[0]
            if name == _END:
                return
            try:
                if name == "begin":
                    crew = None  # its model goes before the next one comes
                    crew = self.together(name, functools.partial(begin, self, *arguments, **named))
                else:
                    getattr(crew, name)(*arguments, **named)
            except RanksError:
                raise
            except Exception as error:
                if error is not self._told:
                    raise
                log(error)

    def end(self) -> None:
        """Let the other ranks go."""
        self.order(_END)

    # ---- exchanges ----

    def _exchange(self, what: str, value: Any, error: SphereError | None = None) -> list[Any]:
        """Tell all ranks, and hear from all."""
        told: list[Any] = [None] * self.size
        self._guarded(what, lambda: dist.all_gather_object(told, (what, value, error)))
        failed = next((one for _, _, one in told if one is not None), None)
        if failed is not None:
            raise self._known(failed)
        for rank, (other, _, _) in enumerate(told):
            if other != what:
                remedy = "This should not happen: please report it, with logs/ and run.log."
                raise self._known(RanksError(f"rank {rank}", f"at {other!r}", f"at {what!r}, as {self.rank}", remedy))
        return [one for _, one, _ in told]

    def _fail(self, what: str, error: Exception) -> NoReturn:
        """Tell all ranks of an error, and raise it."""
        if isinstance(error, SphereError):
            got = error.got if isinstance(error.got, str | int | float | None) else repr(error.got)
            carried = type(error)(error.culprit, got, error.expected, error.remedy)
        else:
            remedy = f"Look into {'run.log' if self.is_main else log_name(self.rank)}."
            carried = RanksError(f"rank {self.rank}", f"{type(error).__name__}: {error}", "no such error", remedy)
        with suppress(SphereError):
            self._exchange(what, None, carried)
        self._told = error
        raise error

    def _known(self, error: SphereError) -> SphereError:
        self._told = error
        return error

    def _guarded(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except RanksError:  # SIGTERM came meanwhile
            raise
        except (RuntimeError, dist.DistError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now, and this is being told already
            line = str(error).strip().partition("\n")[0]
            said = re.sub(r"^\[\S+\] ", "", line).partition(". ")[0]  # without the line of gloo's source
            got = f"no answer at {what!r} ({said})"
            remedy = "One has died, or hangs: see the logs of all ranks, and what torchrun says. " + RESUME
            raise RanksError("the other processes", got, f"all {self.size} of them", remedy) from error

    def _await(self, key: str) -> None:
        """Wait for an order however long it takes: rank 0 may have hours of work of its own."""
        store = self._of_store()

        def wait() -> None:
            pause = 0.001
            while not store.check([key]):  # raises where the store is lost; signals are heard between two looks
                time.sleep(pause)
                pause = min(2 * pause, _LOOK)

        self._guarded("an order", wait)

    def _next(self) -> str:
        self._orders += 1
        return f"sphere-plugin/{self._orders}"

    def _of_store(self) -> Any:
        if self._store is None:
            raise RanksError("the processes", "no store", "one that all of them see", "Start them with torchrun.")
        return self._store


ALONE: Final = Ranks()


class Crewed(Protocol):
    """What has methods that are `led`."""

    ranks: Ranks


Crew = TypeVar("Crew", bound=Crewed)


def led(method: Callable[Concatenate[Crew, P], T]) -> Callable[Concatenate[Crew, P], T]:
    """A method that all ranks call together: rank 0 tells the others before it begins."""

    @functools.wraps(method)
    def call(self: Crew, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.ranks.order(method.__name__, *args, **kwargs)
        return self.ranks.together(method.__name__, lambda: method(self, *args, **kwargs))

    return call


def _packed(value: Any) -> Any:
    """The same with tensors on the CPU and contiguous, each in memory of its own: what all ranks get alike."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=_ROWS)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(_packed, value))
    if isinstance(value, list):
        return list(map(_packed, value))
    if isinstance(value, dict):
        return {key: _packed(one) for key, one in value.items()}
    return value
