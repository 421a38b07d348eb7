"""Video: a camera's frames in, their masks out, in order. `Predictor.stream` makes a `Stream`.

One thread captures, `in_flight` threads work, the caller takes the masks. At most `in_flight` frames are being worked
on or wait for the caller, and one more waits for a thread: memory is bounded, whatever the source and the caller do.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic_ns
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from msa2net.errors import FaultError, FrameError, OutputError, RuntimeUnavailableError
from msa2net.runtimes.measure import percentile

Late = Literal["drop", "wait"]
_Made = TypeVar("_Made")
AGES = 10_000  # the last masks whose ages the report is about
_SOURCE_SECONDS = 1.0  # how long `close` waits for a source that is in the middle of a frame
_LOOK_SECONDS = 0.5  # how often a thread that waits looks whether the stream was thrown away, or the runtime hangs
_OLDEST, _NEWEST = 60_000_000_000, -1_000_000  # nanoseconds of age: beyond, a time of capture is of another clock


@dataclass(frozen=True)
class Streamed(Generic[_Made]):
    """One frame's result, as the caller gets it.

    index         of the frame in the source, from 0; those left out were dropped or refused
    segmentation  as of `Predictor.predict`
    age_ms        milliseconds from the frame's capture to now, when the caller gets it
    late          whether that is more than the stream's deadline
    """

    index: int
    segmentation: _Made
    age_ms: float
    late: bool


@dataclass(frozen=True)
class StreamReport:
    """What came of a stream so far.

    frames     captured; masks: handed to the caller; dropped: gave way to newer ones, or were too old to begin with
    refused    raised a FrameError
    late       masks older than the deadline
    rechecks   golden frames run between the frames, all of which passed
    age_ms     p50, p99 and longest, in milliseconds, of the last `AGES` masks; None where there are too few
    """

    frames: int
    masks: int
    dropped: int
    refused: int
    late: int
    rechecks: int
    age_ms: dict[str, float | None]


@dataclass
class _Job(Generic[_Made]):
    index: int
    frame: Any
    captured: int  # nanoseconds of the monotonic clock, as all times here
    finished: bool = False
    made: _Made | None = None
    refused: FrameError | None = None

    @property
    def has_result(self) -> bool:
        return self.made is not None or self.refused is not None


class _Turn:
    """The runtime, which one frame has at a time; `since` is when it got it. The time in it is what is limited."""

    def __init__(self, lock: threading.Lock, late: Callable[[int], object]) -> None:
        self._lock = lock
        self._late = weakref.WeakMethod(late)  # whose owner has this: the golden frames go with it, not with a cycle
        self.since: int | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self.since = monotonic_ns()

    def __exit__(self, *_: object) -> None:
        began, self.since = self.since, None
        self._lock.release()
        if began is not None and (late := self._late()):
            late(monotonic_ns() - began)


class _Shared(Generic[_Made]):
    """What the threads of one stream share, read and written with `changed` held but for `abandoned`."""

    def __init__(
        self,
        work: Callable[[Any, AbstractContextManager[None]], _Made],
        recheck: Callable[[AbstractContextManager[None]], object],
        latch: Callable[[FaultError], object],
        fault_elsewhere: Callable[[], FaultError | None],
        lock: threading.Lock,
        in_flight: int,
        late: Late,
        deadline: float | None,
        timeout: float,
        recheck_every: int | None,
    ) -> None:
        self.work, self.recheck, self.latch, self.fault_elsewhere = work, recheck, latch, fault_elsewhere
        self.in_flight, self.drop, self.recheck_every = in_flight, late == "drop", recheck_every
        self.deadline, self.timeout = deadline, timeout  # nanoseconds
        self.process = os.getpid()
        self.turn = _Turn(lock, self._check_taken)
        self.changed = threading.Condition()
        self.newest: _Job[_Made] | None = None  # captured, and not begun
        self.line: deque[_Job[_Made]] = deque()  # begun, in the source's order
        self.proving = 0  # golden frames that are due: the end waits for what they say
        self.working = in_flight  # threads that may use the runtime
        self.ended = False  # the source has no more frames
        self.halted = False  # no more frames are begun
        self.closed = False
        self.abandoned = False  # nobody has the stream any more; set without the lock, by the collector
        self.error: BaseException | None = None  # of the source or the work: raised after the masks that are there
        self.fault: FaultError | None = None  # raised at once
        self.frames = self.masks = self.dropped = self.refused = self.late = self.rechecks = self.worked = 0
        self.ages: deque[float] = deque(maxlen=AGES)

    def offer(self, frame: Any, captured: int) -> bool:
        """A frame from the source; False if no more are wanted."""
        with self.changed:
            self._look()
            if self.halted:
                return False
            self.dropped += self.newest is not None
            self.newest = _Job(self.frames, frame, captured)
            self.frames += 1
            self.changed.notify_all()
        return True

    def wait_for_room(self) -> bool:
        """Before the source is asked for a frame; False if no more are wanted."""
        with self.changed:
            while not (self.halted or self.drop or self.newest is None):
                self._wait()
            return not self.halted

    def take(self) -> _Job[_Made] | None:
        """The next frame to work on; None when there will be none."""
        with self.changed:
            while not self.halted:
                job = self.newest
                if job and len(self.line) < self.in_flight:
                    self.newest = None
                    self.changed.notify_all()
                    if self.drop and self.deadline is not None and monotonic_ns() - job.captured > self.deadline:
                        self.dropped += 1
                        continue
                    self.line.append(job)
                    return job
                if job is None and self.ended:
                    return None
                self._wait()
            return None

    def finish(self, job: _Job[_Made], made: _Made | None, refused: FrameError | None) -> bool:
        """A frame that was worked on, with or without a result; True if a golden frame is due."""
        with self.changed:
            job.made, job.refused, job.finished, job.frame = made, refused, True, None
            self.refused += refused is not None
            self.worked += 1
            due = self.recheck_every is not None and self.worked % self.recheck_every == 0 and not self.halted
            self.proving += due
            self.changed.notify_all()
            return due

    def proven(self) -> None:
        with self.changed:
            self.proving, self.rechecks = self.proving - 1, self.rechecks + 1
            self.changed.notify_all()

    def rest(self) -> None:
        """A thread that will not use the runtime any more; after the last one, nothing is left to wait for."""
        with self.changed:
            self.working -= 1
            if not self.working:
                _running.pop(self, None)

    def end(self, error: BaseException | None) -> None:
        """The source has no more frames, or has failed; those that were captured are still worked on."""
        with self.changed:
            self.ended, self.error = True, self.error or error
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self._halt()

    def fail(self, error: BaseException) -> None:
        """The work or a golden frame has raised this; an OutputError is a fault, and no mask is given any more."""
        with self.changed:
            if isinstance(error, FaultError):  # another stream's, which the predictor has refused this one for
                self.fault = self.fault or error
            elif isinstance(error, OutputError) and not self.fault:
                self.fault = FaultError.of(error)
                self.fault.__cause__ = _without_frames(error)
                self.latch(self.fault)
            self.error = self.error or error
            self._halt()

    def check_time(self) -> None:
        """Whether what is in the runtime has been there for too long."""
        if (since := self.turn.since) is not None:
            self._check_taken(monotonic_ns() - since)

    def _check_taken(self, taken: int) -> None:
        if taken > self.timeout and not self.fault:
            found = f"a frame has been in the runtime for {taken / 1e6:.0f} ms"
            expected = f"expected at most {self.timeout / 1e6:g} (timeout_ms)"
            self.fail(OutputError("stream", found, expected, "Is the device overloaded?"))

    def _halt(self) -> None:
        self.halted, self.newest = True, None
        self.changed.notify_all()

    def _look(self) -> None:
        self.check_time()
        if self.abandoned:
            self._halt()

    def _wait(self) -> None:
        self.changed.wait(_LOOK_SECONDS)
        self._look()

    def next(self) -> Streamed[_Made]:
        with self.changed:
            while True:
                self.check_time()
                if fault := self.fault or self.fault_elsewhere():
                    self.fault = fault
                    self._halt()
                    # A new one each time: what is raised gathers the callers' frames.
                    raise FaultError.of(fault) from fault.__cause__
                if self.closed:
                    raise StopIteration
                if self.line and self.line[0].has_result:
                    job = self.line.popleft()
                    self.changed.notify_all()
                    return self._handed_over(job)
                stopped = self.halted and (not self.line or self.line[0].finished)
                if stopped or (self.ended and not self.line and self.newest is None and not self.proving):
                    self.closed = True
                    self._halt()
                    raise self.error or StopIteration
                since = self.turn.since
                left = None if since is None else (since + self.timeout - monotonic_ns()) / 1e9 + 1e-3
                self.changed.wait(_LOOK_SECONDS if left is None else min(max(left, 0), _LOOK_SECONDS))

    def _handed_over(self, job: _Job[_Made]) -> Streamed[_Made]:
        if job.made is None:
            raise job.refused or StopIteration
        age = monotonic_ns() - job.captured
        late = self.deadline is not None and age > self.deadline
        self.masks, self.late = self.masks + 1, self.late + late
        self.ages.append(age / 1e6)
        return Streamed(job.index, job.made, age / 1e6, late)


def _without_frames(error: BaseException) -> BaseException:
    """The error and its causes without their tracebacks, which would keep images for as long as it is kept."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause.__context__ = None
        cause = cause.__cause__
    return error


class _Threads:
    """The threads of one stream, apart from it, so that they can be ended when the process is."""

    def __init__(self, shared: _Shared[Any], frames: Iterable[Any]) -> None:
        self.shared = shared
        self.workers = [threading.Thread(target=_work, args=(shared,), daemon=True) for _ in range(shared.in_flight)]
        self.source = threading.Thread(target=_capture, args=(shared, frames), daemon=True)
        _running[shared] = self
        try:
            for thread in (*self.workers, self.source):
                thread.start()
        except RuntimeError as error:  # there is no memory for its stack
            shared.close()
            _running.pop(shared, None)
            found = f"cannot start a thread ({error})"
            raise RuntimeUnavailableError("stream", found, "", "Free memory, or allow more threads.") from error

    def end(self) -> None:
        """Halts, and waits until the runtime is at rest, at most for the timeout; see `Stream.close`."""
        shared = self.shared
        if os.getpid() != shared.process:  # a child has none of the threads, and a lock may be held for ever
            return
        shared.close()
        end = monotonic_ns() + shared.timeout
        for worker in self.workers:
            while worker.is_alive() and worker is not threading.current_thread() and monotonic_ns() < end:
                since = shared.turn.since
                if shared.fault and since is not None and monotonic_ns() - since > shared.timeout:
                    break
                worker.join(0.01)
        shared.check_time()
        if self.source is not threading.current_thread():
            self.source.join(_SOURCE_SECONDS)
        _running.pop(shared, None)
        give_memory_back()


def give_memory_back() -> None:
    """Each new thread may take another of glibc's arenas, which keep what the frames of one stream needed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


_running: dict[_Shared[Any], _Threads] = {}


@atexit.register
def _end_all() -> None:
    """A thread that is stopped inside a runtime at the end of the process would abort it."""
    for threads in list(_running.values()):
        threads.end()


class Stream(Iterator[Streamed[_Made]], Generic[_Made]):
    """Iterate over it, or take one with `next`; as a context manager it is closed at the end of the block.

    `next` raises FrameError for a frame that cannot be segmented, and goes on with the next if it is called again;
    what the source raises, after the masks of the frames before it; FaultError (see `Predictor.stream`), each time it
    is called; and StopIteration when the source has ended or the stream is closed.
    """

    def __init__(self, shared: _Shared[_Made], frames: Iterable[Any]) -> None:
        self._shared = shared
        self._threads = _Threads(shared, frames)
        # The threads hold `shared` and not the stream: one that is thrown away unclosed stops them.
        weakref.finalize(self, _abandon, shared).atexit = False

    def __next__(self) -> Streamed[_Made]:
        self._require_own_process()
        return self._shared.next()

    def report(self) -> StreamReport:
        """So far; also after the end."""
        self._require_own_process()
        shared = self._shared
        with shared.changed:
            ages = list(shared.ages)
            counts = (shared.frames, shared.masks, shared.dropped, shared.refused, shared.late, shared.rechecks)
        p50, longest = (percentile(ages, 50), max(ages)) if ages else (None, None)
        return StreamReport(*counts, {"p50": p50, "p99": percentile(ages, 99), "longest": longest})

    def close(self) -> None:
        """Ends it, from any thread; a caller who waits for a mask gets StopIteration. A second call does nothing.

        Waits until the runtime is at rest, at most for the timeout; what is in it for longer is a fault. Waits no more
        than a second for a source that is blocked: that thread ends with the source's next frame.
        """
        self._threads.end()

    def _require_own_process(self) -> None:
        if os.getpid() != self._shared.process:
            raise RuntimeUnavailableError(
                "stream", "was started before a fork", "expected the process that started it", "Start one in the child."
            )

    def __enter__(self) -> Stream[_Made]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _abandon(shared: _Shared[Any]) -> None:
    """No lock is taken: the collector may run in the middle of anything."""
    shared.abandoned = True


def start(
    work: Callable[[Any, AbstractContextManager[None]], _Made],
    recheck: Callable[[AbstractContextManager[None]], object],
    frames: Iterable[Any],
    *,
    latch: Callable[[FaultError], object],
    fault_elsewhere: Callable[[], FaultError | None],
    lock: threading.Lock,
    in_flight: int,
    late: Late,
    deadline_ms: float | None,
    timeout_ms: float,
    recheck_every: int | None,
) -> Stream[_Made]:
    """A stream of what `work` makes of each frame; see `Predictor.stream`.

    work, recheck    use the runtime with what they are given as their last argument held
    recheck          raises OutputError if the device no longer does what was exported
    latch            is told of a fault, with the stream's lock held
    fault_elsewhere  one that this stream did not find, for which it gives no mask either, reset or not
    lock             of the runtime, which the streams of one predictor share
    """
    for name, count in (("in_flight", in_flight), ("recheck_every", 1 if recheck_every is None else recheck_every)):
        if type(count) is not int or count < 1:
            raise RuntimeUnavailableError(name, f"got {count!r}", "expected a whole number of at least 1", "Check it.")
    for name, limit in (("deadline_ms", 1.0 if deadline_ms is None else deadline_ms), ("timeout_ms", timeout_ms)):
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise RuntimeUnavailableError(name, f"got {limit!r}", "expected milliseconds above 0", "Check it.")
    if late not in ("drop", "wait"):
        raise RuntimeUnavailableError("late", f"got {late!r}", "expected 'drop' or 'wait'", "Check it.")
    deadline = None if deadline_ms is None else deadline_ms * 1e6
    shared = _Shared(
        work, recheck, latch, fault_elsewhere, lock, in_flight, late, deadline, timeout_ms * 1e6, recheck_every
    )
    return Stream(shared, frames)


def _capture(shared: _Shared[Any], frames: Iterable[Any]) -> None:
    try:
        source = iter(frames)
        while shared.wait_for_room():
            try:
                item = next(source)
            except StopIteration:
                break
            captured = monotonic_ns()
            if isinstance(item, tuple):
                try:
                    item, captured = _stamped(item, captured)
                except FrameError as error:  # in the frame's place, which a driver may give once: the next is looked at
                    item = error
            if isinstance(item, np.ndarray):
                item = item.copy()  # a camera may write its next frame where it wrote this one
            if not shared.offer(item, captured):
                break
            del item  # it may be large, and the next may be long in coming
    except BaseException as error:  # the caller's thread raises it
        shared.end(error)
    else:
        shared.end(None)


def _stamped(item: tuple[Any, ...], now: int) -> tuple[Any, int]:
    """A frame and its time of capture. Raises FrameError for a time of another clock or unit."""
    # Soon after the machine's start any number is recent: nothing was captured in the first hundredth of its time.
    if len(item) == 2 and type(item[1]) is int and _NEWEST <= now - item[1] <= min(_OLDEST, 0.99 * now):
        return item
    found = f"got {len(item)} values"
    if len(item) == 2:  # only a number is shown: another value may say whose image it is
        found = f"got {item[1]}" if type(item[1]) in (int, float) else f"got a {type(item[1]).__name__}"
    expected = f"expected a frame and an int, nanoseconds of time.monotonic_ns(), now {now}, at most a minute old"
    raise FrameError("capture", found, expected, "Leave the time out, or take it from that clock.")


def _work(shared: _Shared[Any]) -> None:
    try:
        while job := shared.take():
            made = refused = None
            try:
                if isinstance(job.frame, FrameError):
                    raise job.frame
                made = shared.work(job.frame, shared.turn)
            except FrameError as error:
                refused = error
            except BaseException as error:  # the caller's thread raises it
                shared.fail(error)
            due = shared.finish(job, made, refused)
            del job, made, refused
            if due:
                shared.recheck(shared.turn)
                shared.proven()
    except BaseException as error:
        shared.fail(error)
    finally:
        shared.rest()
