"""Video: a camera's frames in, their masks out, in order. `Predictor.stream` makes a `Stream`.

One thread captures, `in_flight` threads work, the caller takes the masks. At most `in_flight` frames are being worked
on or wait for the caller, and one more waits for a thread: memory is bounded, whatever the source and the caller do.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import monotonic_ns
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

from msa2net.errors import FaultError, FrameError, OutputError, RuntimeUnavailableError
from msa2net.runtimes.measure import percentile

Late = Literal["drop", "wait"]
_Made = TypeVar("_Made")
AGES = 10_000  # the last masks whose ages the report is about
_SOURCE_SECONDS = 1.0  # how long `close` waits for a source that is in the middle of a frame


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
    started: int = 0
    finished: bool = False
    made: _Made | None = None
    refused: FrameError | None = None

    @property
    def has_result(self) -> bool:
        return self.made is not None or self.refused is not None


class _Shared(Generic[_Made]):
    """What the threads of one stream share; everything is read and written with `changed` held."""

    def __init__(
        self,
        work: Callable[[Any], _Made],
        recheck: Callable[[], object],
        latch: Callable[[FaultError], object],
        in_flight: int,
        late: Late,
        deadline: float | None,
        timeout: float,
        recheck_every: int | None,
    ) -> None:
        self.work, self.recheck, self.latch = work, recheck, latch
        self.in_flight, self.drop, self.recheck_every = in_flight, late == "drop", recheck_every
        self.deadline, self.timeout = deadline, timeout  # nanoseconds
        self.changed = threading.Condition()
        self.newest: _Job[_Made] | None = None  # captured, and not begun
        self.line: deque[_Job[_Made]] = deque()  # begun, in the source's order
        self.ended = False  # the source has no more frames
        self.halted = False  # no more frames are begun
        self.closed = False
        self.error: BaseException | None = None  # of the source or the work: raised after the masks that are there
        self.fault: FaultError | None = None  # raised at once
        self.frames = self.masks = self.dropped = self.refused = self.late = self.rechecks = self.worked = 0
        self.ages: deque[float] = deque(maxlen=AGES)

    def offer(self, frame: Any, captured: int) -> bool:
        """A frame from the source; False if no more are wanted."""
        with self.changed:
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
            self.changed.wait_for(lambda: self.halted or self.drop or self.newest is None)
            return not self.halted

    def take(self) -> _Job[_Made] | None:
        """The next frame to work on; None when there will be none."""
        with self.changed:
            while not self.halted:
                job = self.newest
                if job and len(self.line) < self.in_flight:
                    self.newest = None
                    job.started = monotonic_ns()
                    self.changed.notify_all()
                    if self.drop and self.deadline is not None and job.started - job.captured > self.deadline:
                        self.dropped += 1
                        continue
                    self.line.append(job)
                    return job
                if job is None and self.ended:
                    return None
                self.changed.wait()
            return None

    def finish(self, job: _Job[_Made]) -> bool:
        """A frame that was worked on; True if a golden frame is due."""
        with self.changed:
            job.finished = True  # with or without a result
            self.refused += job.refused is not None
            self.worked += 1
            self._check_time(job, monotonic_ns())
            self.changed.notify_all()
            return self.recheck_every is not None and self.worked % self.recheck_every == 0 and not self.halted

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
            if isinstance(error, OutputError) and not self.fault:
                self.fault = FaultError(error.place, error.found, error.expected, error.advice)
                self.fault.__cause__ = error
                self.latch(self.fault)
            self.error = self.error or error
            self._halt()

    def _halt(self) -> None:
        self.halted, self.newest = True, None
        self.changed.notify_all()

    def _check_time(self, job: _Job[_Made], now: int) -> None:
        if (taken := now - job.started) > self.timeout:
            found = f"frame {job.index} has taken {taken / 1e6:.0f} ms"
            expected = f"expected at most {self.timeout / 1e6:g} (timeout_ms)"
            self.fail(OutputError("stream", found, expected, "Is the device overloaded?"))

    def next(self) -> Streamed[_Made]:
        with self.changed:
            while True:
                now = monotonic_ns()
                for job in self.line:
                    if not job.finished:
                        self._check_time(job, now)
                if self.fault:
                    raise self.fault
                if self.closed:
                    raise StopIteration
                if self.line and self.line[0].has_result:
                    job = self.line.popleft()
                    self.changed.notify_all()
                    return self._handed_over(job, now)
                stopped = self.halted and (not self.line or self.line[0].finished)
                if stopped or (self.ended and not self.line and self.newest is None):
                    self.closed = True
                    self._halt()
                    raise self.error or StopIteration
                running = [job.started for job in self.line if not job.finished]
                self.changed.wait((min(running) + self.timeout - now) / 1e9 + 1e-3 if running else None)

    def _handed_over(self, job: _Job[_Made], now: int) -> Streamed[_Made]:
        if job.made is None:
            raise job.refused or StopIteration
        age = now - job.captured
        late = self.deadline is not None and age > self.deadline
        self.masks, self.late = self.masks + 1, self.late + late
        self.ages.append(age / 1e6)
        return Streamed(job.index, job.made, age / 1e6, late)


class Stream(Iterator[Streamed[_Made]], Generic[_Made]):
    """Iterate over it, or take one with `next`; as a context manager it is closed at the end of the block.

    `next` raises FrameError for a frame that cannot be segmented, and goes on with the next if it is called again;
    what the source raises, after the masks of the frames before it; FaultError (see `Predictor.stream`), each time it
    is called; and StopIteration when the source has ended or the stream is closed.
    """

    def __init__(self, shared: _Shared[_Made], frames: Iterable[Any]) -> None:
        self._shared = shared
        # The threads hold `shared` and not the stream: one that is thrown away unclosed stops them.
        self._stop = weakref.finalize(self, shared.close)
        self._workers = [threading.Thread(target=_work, args=(shared,), daemon=True) for _ in range(shared.in_flight)]
        self._source = threading.Thread(target=_capture, args=(shared, frames), daemon=True)
        for thread in (*self._workers, self._source):
            thread.start()

    def __next__(self) -> Streamed[_Made]:
        return self._shared.next()

    def report(self) -> StreamReport:
        """So far; also after the end."""
        shared = self._shared
        with shared.changed:
            ages = list(shared.ages)
            counts = (shared.frames, shared.masks, shared.dropped, shared.refused, shared.late, shared.rechecks)
        p50, longest = (percentile(ages, 50), max(ages)) if ages else (None, None)
        return StreamReport(*counts, {"p50": p50, "p99": percentile(ages, 99), "longest": longest})

    def close(self) -> None:
        """Ends it, from any thread; a caller who waits for a mask gets StopIteration. A second call does nothing.

        Waits until the runtime is at rest, but not for a frame that has run into the timeout, nor more than a second
        for a source that is blocked: that thread ends with the source's next frame.
        """
        self._stop()
        shared = self._shared
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join(0 if shared.fault else shared.timeout / 1e9)
        if self._source is not threading.current_thread():
            self._source.join(_SOURCE_SECONDS)

    def __enter__(self) -> Stream[_Made]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def start(
    work: Callable[[Any], _Made],
    recheck: Callable[[], object],
    latch: Callable[[FaultError], object],
    frames: Iterable[Any],
    *,
    in_flight: int,
    late: Late,
    deadline_ms: float | None,
    timeout_ms: float,
    recheck_every: int | None,
) -> Stream[_Made]:
    """A stream of what `work` makes of each frame; see `Predictor.stream`.

    recheck   raises OutputError if the device no longer does what was exported
    latch     is told of a fault, with the stream's lock held
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
    shared = _Shared(work, recheck, latch, in_flight, late, deadline, timeout_ms * 1e6, recheck_every)
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
                item, captured = item
            if not shared.offer(item, captured):
                break
    except BaseException as error:  # the caller's thread raises it
        shared.end(error)
    else:
        shared.end(None)


def _work(shared: _Shared[Any]) -> None:
    while job := shared.take():
        try:
            job.made = shared.work(job.frame)
        except FrameError as error:
            job.refused = error
        except BaseException as error:  # the caller's thread raises it
            shared.fail(error)
        job.frame = None
        if shared.finish(job):
            try:
                shared.recheck()
            except BaseException as error:
                shared.fail(error)
            else:
                with shared.changed:
                    shared.rechecks += 1
