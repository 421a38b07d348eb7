"""Video: order, bounds, drops, deadlines, faults, ends. Most of it runs on a stand-in for the work, whose every step
is let go by the test: nothing here waits for a clock to prove an order."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from msa2net.core.phantoms import frames
from msa2net.errors import FaultError, FrameError, Msa2NetError, OutputError, RuntimeUnavailableError
from msa2net.runtimes import Predictor, stream
from msa2net.runtimes.stream import Stream

PATIENCE = 20.0  # seconds until a test that hangs fails


def started(work: Callable[[Any], Any], source: Any, **options: Any) -> Stream[Any]:
    given: dict[str, Any] = {
        "in_flight": 2,
        "late": "wait",
        "deadline_ms": None,
        "timeout_ms": PATIENCE * 1000,
        "recheck_every": None,
    }
    recheck = options.pop("recheck", lambda: None)
    given |= {"latch": lambda _: None, "fault_elsewhere": lambda: None, "lock": threading.Lock()} | options

    def with_turn(frame: Any, turn: AbstractContextManager[None]) -> Any:
        with turn:
            return work(frame)

    def recheck_with_turn(turn: AbstractContextManager[None]) -> None:
        with turn:
            recheck()

    return stream.start(with_turn, recheck_with_turn, source, **given)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


class Gate:
    """Work that takes until it is let go, frame by frame; it says what it was given."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self._open = {each: threading.Event() for each in range(100)}

    def __call__(self, frame: Any) -> Any:
        self.begun.append(frame)
        assert self._open[frame].wait(PATIENCE)
        return f"mask {frame}"

    def let(self, *which: int) -> None:
        for each in which:
            self._open[each].set()


def test_masks_come_in_the_order_of_the_source_whatever_the_order_of_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    monkeypatch.setattr(stream._Turn, "__enter__", lambda _: None)
    monkeypatch.setattr(stream._Turn, "__exit__", lambda *_: None)
    with started(gate, range(6), in_flight=3) as found:
        until(lambda: sorted(gate.begun) == [0, 1, 2])
        gate.let(2, 1, 5, 4, 3)
        time.sleep(0.01)
        gate.let(0)
        made = list(found)
    assert [(each.index, each.segmentation) for each in made] == [(i, f"mask {i}") for i in range(6)]
    report = found.report()
    assert (report.frames, report.masks, report.dropped, report.late) == (6, 6, 0, 0)
    assert all(each.age_ms >= 0 for each in made)


def test_what_is_held_is_bounded_and_a_waiting_stream_asks_the_source_for_no_more() -> None:
    given: list[int] = []

    def source() -> Iterator[int]:
        for i in range(50):
            given.append(i)
            yield i

    with started(lambda frame: frame, source(), in_flight=2) as found:
        until(lambda: len(given) == 3)  # two done and not taken, one waiting
        time.sleep(0.05)
        assert len(given) == 3
        assert [each.index for each in found] == list(range(50))
    assert found.report().frames == 50


def test_a_dropping_stream_gives_the_newest_frame_and_counts_the_others() -> None:
    gate, fed = Gate(), threading.Event()

    def source() -> Iterator[int]:
        yield 0
        until(lambda: gate.begun == [0])
        yield from range(1, 8)
        fed.set()

    with started(gate, source(), in_flight=1, late="drop") as found:
        assert fed.wait(PATIENCE)
        gate.let(*range(8))
        assert [each.index for each in found] == [0, 7]
    report = found.report()
    assert (report.frames, report.masks, report.dropped) == (8, 2, 6)


@pytest.mark.parametrize("late", ["drop", "wait"])
def test_a_frame_that_is_too_old_is_dropped_or_given_and_marked(late: stream.Late) -> None:

    def one_by_one() -> Iterator[Any]:
        for name, age in (("old", 40), ("new", 0)):
            yield name, time.monotonic_ns() - age * 1_000_000_000
            until(lambda: began or (streams and streams[0].report().dropped))

    began: list[str] = []
    streams: list[Stream[str]] = []

    def work(frame: str) -> str:
        began.append(frame)
        return frame

    with started(work, one_by_one(), late=late, deadline_ms=PATIENCE * 1000) as found:
        streams.append(found)
        made = [(each.segmentation, each.late) for each in found]
    assert made == ([("new", False)] if late == "drop" else [("old", True), ("new", False)])
    report = found.report()
    assert (report.dropped, report.late) == ((1, 0) if late == "drop" else (0, 1))


def test_the_age_is_counted_from_the_capture_that_the_source_names() -> None:
    with started(lambda frame: frame, [("frame", time.monotonic_ns() - 5_000_000_000)]) as found:
        assert 5000 <= next(found).age_ms < 5000 + PATIENCE * 1000
    report = found.report()
    assert report.age_ms["longest"] is not None
    assert report.age_ms["longest"] >= 5000
    assert report.age_ms["p99"] is None  # of one sample


def test_a_frame_that_cannot_be_segmented_is_an_error_in_its_place_and_the_next_one_follows() -> None:
    def work(frame: int) -> int:
        if frame == 1:
            raise FrameError("frame", "is 1")
        return frame

    with started(work, range(3)) as found:
        assert next(found).index == 0
        with pytest.raises(FrameError, match="is 1"):
            next(found)
        assert next(found).index == 2
        with pytest.raises(StopIteration):
            next(found)
    assert found.report().refused == 1


def test_what_the_source_raises_comes_after_the_masks_of_the_frames_before() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise OSError("the camera is gone")

    with started(lambda frame: frame, source()) as found:
        assert [next(found).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="the camera is gone"):
            next(found)
        with pytest.raises(StopIteration):
            next(found)


def test_what_is_no_source_is_an_error_of_the_caller() -> None:
    with started(lambda frame: frame, 5) as found, pytest.raises(TypeError, match="not iterable"):
        next(found)


def test_an_error_of_the_work_that_is_no_fault_ends_the_stream() -> None:
    latched: list[FaultError] = []

    def work(frame: int) -> int:
        if frame == 1:
            raise MemoryError("no room")
        return frame

    with started(work, itertools.count(), in_flight=1, latch=latched.append) as found:
        assert next(found).index == 0
        with pytest.raises(MemoryError, match="no room"):
            next(found)
        with pytest.raises(StopIteration):
            next(found)
    assert not latched


def test_a_fault_holds_back_the_masks_that_are_there_and_is_raised_again_and_again() -> None:
    latched: list[FaultError] = []

    def work(frame: int) -> Any:
        if frame == 1:
            raise OutputError("logits", "got NaN or infinity", "expected finite values", "Verify the bundle.")
        return frame

    with started(work, itertools.count(), latch=latched.append) as found:
        until(lambda: latched)
        assert found._shared.line[0].has_result  # frame 0 is ready, and is not given
        lengths = set()
        for _ in range(3):
            with pytest.raises(FaultError, match="logits: got NaN or infinity, expected finite values") as caught:
                next(found)
            lengths.add(len(traceback.extract_tb(caught.tb)))
    assert isinstance(caught.value.__cause__, OutputError)
    assert len(latched) == len(lengths) == 1  # what is raised does not gather its callers
    assert latched[0].__traceback__ is None
    assert found.report().masks == 0


@pytest.mark.parametrize("waits", [True, False])
def test_a_frame_over_the_timeout_is_a_fault_whether_it_hangs_or_ends_late(waits: bool) -> None:
    latched: list[FaultError] = []
    gate = Gate()
    with started(gate, itertools.count(), timeout_ms=50, latch=latched.append) as found:
        if not waits:
            until(lambda: 0 in gate.begun)
            time.sleep(0.1)
            gate.let(0)  # it ends, and nobody has asked in between
            until(lambda: latched)
        with pytest.raises(FaultError, match=r"in the runtime for \d+ ms, expected at most 50 \(timeout_ms\)"):
            next(found)
        start = time.monotonic()
    assert time.monotonic() - start < PATIENCE / 2, "closing waited for a frame that hangs"
    assert len(latched) == 1
    gate.let(*range(100))


def test_waiting_for_the_turn_is_no_part_of_the_time() -> None:
    """Four frames of 60 ms one after the other, with 150 ms for each."""
    with started(lambda frame: (time.sleep(0.06), frame), range(12), in_flight=4, timeout_ms=1500) as found:
        assert len(list(found)) == 12
        assert found._shared.timeout == 1500e6


def test_a_golden_frame_that_hangs_is_a_fault() -> None:
    let_go = threading.Event()
    with started(
        lambda frame: frame,
        range(9),
        in_flight=1,
        recheck_every=1,
        timeout_ms=50,
        recheck=lambda: let_go.wait(PATIENCE),
    ) as found:
        assert next(found).index == 0
        with pytest.raises(FaultError, match="in the runtime for"):
            next(found)
    let_go.set()


def test_closing_while_a_frame_hangs_latches_it() -> None:
    latched: list[FaultError] = []
    gate = Gate()
    with started(gate, range(9), timeout_ms=80, latch=latched.append):
        until(lambda: gate.begun)
    assert len(latched) == 1
    gate.let(*range(9))


@pytest.mark.parametrize(
    "stamp",
    [None, 1.5, True, "now", int(time.monotonic()), time.time_ns()],
    ids=["none", "float", "bool", "text", "s", "wall"],
)
@pytest.mark.parametrize("late", ["drop", "wait"])
def test_a_time_of_another_clock_is_an_error_and_not_a_drop(stamp: Any, late: stream.Late) -> None:
    with (
        started(lambda frame: frame, [("frame", stamp)], late=late, deadline_ms=1000) as found,
        pytest.raises(
            FrameError, match=r"capture: got .*, expected a frame and an int, nanoseconds of time.monotonic_ns\(\)"
        ),
    ):
        next(found)


def test_a_fault_of_another_stream_stops_this_one() -> None:
    fault: list[FaultError] = []
    with started(lambda frame: frame, itertools.count(), fault_elsewhere=lambda: fault[0] if fault else None) as found:
        assert next(found).index == 0
        fault.append(FaultError("logits", "got NaN"))
        with pytest.raises(FaultError, match="got NaN"):
            next(found)
        fault.clear()  # the predictor was reset: this stream has ended all the same
        with pytest.raises(FaultError, match="got NaN"):
            next(found)


@pytest.mark.parametrize(
    ("stamp", "text"),
    [
        (np.int64(5), "got a int64"),
        (b"Sekret^Siri", "got a bytes"),
        ([1], "got a list"),
    ],
)
def test_a_time_that_is_none_is_named_and_not_shown(stamp: Any, text: str) -> None:
    with started(lambda frame: frame, [("frame", stamp)]) as found, pytest.raises(FrameError) as caught:
        next(found)
    assert str(caught.value).startswith(f"capture: {text}, expected a frame and an int, nanoseconds of ")


def test_one_time_that_is_wrong_is_an_error_in_its_place_and_the_next_frame_follows() -> None:
    source = [(0, time.monotonic_ns()), (1, 0), (2, time.monotonic_ns())]
    with started(lambda frame: frame, source) as found:
        assert next(found).index == 0
        with pytest.raises(FrameError, match="capture: got 0, expected"):
            next(found)
        assert next(found).index == 2
    assert found.report().refused == 1


@pytest.mark.parametrize(
    ("stamp", "right"),
    [(19_900_000_000, True), (20_000_500_000, True), (20_000_000, False), (20_000, False), (0, False), (-1, False)],
)
def test_other_units_are_found_out_in_the_first_minute_of_a_machine_too(stamp: int, right: bool) -> None:
    if right:
        assert stream._stamped(("frame", stamp), 20_000_000_000) == ("frame", stamp)
    else:
        with pytest.raises(FrameError, match="capture"):
            stream._stamped(("frame", stamp), 20_000_000_000)


def test_a_camera_may_write_each_frame_where_it_wrote_the_last() -> None:
    gate = threading.Event()

    def camera() -> Iterator[NDArray[np.uint8]]:
        buffer = np.zeros(4, np.uint8)
        for i in range(4):
            buffer[:] = i
            yield buffer
        buffer[:] = 99
        gate.set()

    with started(lambda frame: (gate.wait(PATIENCE), int(frame[0]))[1], camera(), in_flight=4) as found:
        assert [each.segmentation for each in found] == [0, 1, 2, 3]


LEFT_OPEN = """
import itertools, os, sys
import numpy as np
from msa2net import Predictor
from msa2net.errors import RuntimeUnavailableError
predictor = Predictor.load(runtime=sys.argv[1], cache=False, threads=1)
stream = predictor.stream(itertools.cycle([np.zeros((480, 640, 3), np.uint8)]), in_flight=3)
next(stream)
for _ in range(8):  # in any state of the locks
    next(stream)
    if not (child := os.fork()):
        for call in (stream.__next__, stream.report, lambda: predictor.predict(np.zeros((8, 8), np.uint8))):
            try:
                call()
                os._exit(3)
            except RuntimeUnavailableError as error:
                if "before a fork" not in str(error):
                    os._exit(4)
        stream.close()
        predictor.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("done")
"""


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "pytorch"])
def test_forks_beside_a_stream_and_a_process_that_ends_with_one_left_open(runtime: str) -> None:
    """The child is told, and neither hangs nor crashes; the parent goes on, and ends without an abort."""
    command = [sys.executable, "-W", "ignore", "-c", LEFT_OPEN, runtime]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_golden_frame_runs_after_so_many_frames_and_its_failure_is_a_fault() -> None:
    sequence: list[str] = []
    latched: list[FaultError] = []

    def recheck() -> None:
        sequence.append("golden")
        if sequence.count("golden") == 3:
            raise OutputError("golden frame", "is off")

    def work(frame: int) -> int:
        sequence.append("frame")
        return frame

    with started(work, itertools.count(), in_flight=1, recheck_every=4, recheck=recheck, latch=latched.append) as found:
        given = []
        with pytest.raises(FaultError, match="golden frame: is off"):
            given.extend(each.index for each in found)
    assert sequence == (["frame"] * 4 + ["golden"]) * 3
    assert found.report().rechecks == 2
    assert given == list(range(len(given)))
    assert len(given) <= 12


def test_the_end_waits_for_a_golden_frame_that_is_due() -> None:
    let_go = threading.Event()

    def recheck() -> None:
        assert let_go.wait(PATIENCE)
        raise OutputError("golden frame", "is off")

    with started(lambda frame: frame, range(4), recheck_every=4, recheck=recheck) as found:
        assert [next(found).index for _ in range(4)] == [0, 1, 2, 3]
        threading.Timer(0.05, let_go.set).start()
        with pytest.raises(FaultError, match="golden frame: is off"):
            next(found)


def test_closing_from_another_thread_ends_a_caller_who_waits_and_a_source_that_blocks() -> None:
    blocked, ended = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        try:
            yield 0
            blocked.wait(PATIENCE)
            yield 1
        finally:
            ended.set()

    found = started(lambda frame: frame, source())
    assert next(found).index == 0
    caller = threading.Thread(target=lambda: list(found), daemon=True)
    caller.start()
    found.close()
    caller.join(PATIENCE)
    assert not caller.is_alive()
    blocked.set()
    assert ended.wait(PATIENCE), "the source was not let go"
    found.close()  # a second time does nothing
    with pytest.raises(StopIteration):
        next(found)


def test_a_stream_that_is_thrown_away_stops_its_threads() -> None:
    before = threading.active_count()
    for each in started(lambda frame: frame, itertools.count()):
        if each.index == 3:
            break
    del each
    gc.collect()
    until(lambda: threading.active_count() <= before)


def test_a_process_that_ends_waits_for_a_stream_that_was_thrown_away() -> None:
    """A thread that is stopped inside a runtime aborts the process."""
    gate = Gate()
    found = started(gate, itertools.count())
    until(lambda: gate.begun)
    shared = found._shared
    del found
    gc.collect()
    assert shared.abandoned
    assert shared in stream._running
    gate.let(*range(100))
    until(lambda: shared not in stream._running)


def test_what_a_stream_held_is_freed_when_it_ends_and_not_by_a_collection(
    predictors: dict[str, Predictor], images: list[NDArray[np.uint8]]
) -> None:
    gc.collect()
    gc.disable()
    try:
        with predictors["onnxruntime"].stream(images, late="wait", recheck_every=2, timeout_ms=60_000) as found:
            assert len(list(found)) == len(images)
        held = weakref.ref(found._shared)
        assert held()
        del found
        until(lambda: held() is None)
    finally:
        gc.enable()


def test_leaving_the_block_by_an_exception_stops_the_threads() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), started(lambda frame: frame, itertools.count()) as found:
        _ = next(found).index / 0
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"in_flight": 0}, "in_flight: got 0, expected a whole number of at least 1. Check it."),
        ({"in_flight": True}, "in_flight: got True, expected a whole number of at least 1. Check it."),
        ({"recheck_every": 0}, "recheck_every: got 0, expected a whole number of at least 1. Check it."),
        ({"deadline_ms": 0}, "deadline_ms: got 0, expected milliseconds above 0. Check it."),
        ({"deadline_ms": float("nan")}, "deadline_ms: got nan, expected milliseconds above 0. Check it."),
        ({"timeout_ms": -1}, "timeout_ms: got -1, expected milliseconds above 0. Check it."),
        ({"timeout_ms": float("inf")}, "timeout_ms: got inf, expected milliseconds above 0. Check it."),
        ({"late": "never"}, "late: got 'never', expected 'drop' or 'wait'. Check it."),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        started(lambda frame: frame, [], **options)
    assert str(caught.value) == text


# With a real predictor


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    return frames((120, 160, 3), 6, 77)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "pytorch"])
def test_a_stream_gives_the_masks_of_predict(
    predictors: dict[str, Predictor], runtime: str, images: list[NDArray[np.uint8]]
) -> None:
    predictor = predictors[runtime]
    with predictor.stream(images, in_flight=3, late="wait", recheck_every=2, timeout_ms=60_000) as found:
        made = list(found)
    assert [each.index for each in made] == list(range(len(images)))
    for each, image in zip(made, images, strict=True):
        assert np.array_equal(each.segmentation.mask, predictor.predict(image).mask)
    assert found.report().rechecks == 3


def test_a_region_is_the_frames_and_not_the_callers_list(
    predictors: dict[str, Predictor], images: list[NDArray[np.uint8]]
) -> None:
    region: Any = [10, 20, 80, 130]
    made = predictors["onnxruntime"].predict(images[0], region=region)
    with predictors["onnxruntime"].stream(images, late="wait", region=region) as found:
        region[0] = 0
        assert {each.segmentation.region for each in found} == {(10, 20, 80, 130)}
    assert made.region == (10, 20, 80, 130)
    narrow: Any = tuple(np.array([100, 60, 200, 200], np.uint8))  # whose sums have no room in their own type
    large = np.zeros((300, 300), np.uint8)
    assert predictors["onnxruntime"].predict(large, region=narrow).on_frame().shape == large.shape


def test_a_region_is_looked_at_alone(predictors: dict[str, Predictor], images: list[NDArray[np.uint8]]) -> None:
    predictor, image = predictors["onnxruntime"], images[0]
    alone = predictor.predict(np.ascontiguousarray(image[10:90, 20:150]))
    with predictor.stream([image], late="wait", region=(10, 20, 80, 130)) as found:
        segmentation = next(found).segmentation
    assert np.array_equal(segmentation.mask, alone.mask)
    assert segmentation.region == (10, 20, 80, 130)
    whole = segmentation.on_frame(outside=9)
    assert whole.shape == image.shape[:2]
    assert np.array_equal(whole[10:90, 20:150], alone.mask)
    assert (whole == 9).sum() == whole.size - alone.mask.size
    assert np.array_equal(alone.on_frame(), alone.mask)
    indices = tuple(np.array([10, 20, 80, 130]))
    assert np.array_equal(predictor.predict(image, region=indices).mask, alone.mask)


@pytest.mark.parametrize(
    "region", [(0, 0, 121, 10), (-1, 0, 10, 10), (0, 0, 0, 10), (0, 150, 10, 11), (0, 0, 10), (0, 0, 1.0, 10), 5]
)
def test_a_region_beyond_the_frame_is_refused(
    predictors: dict[str, Predictor], images: list[NDArray[np.uint8]], region: Any
) -> None:
    with pytest.raises(FrameError, match=r"region: got .* of a frame \(120, 160, 3\), expected"):
        predictors["onnxruntime"].predict(images[0], region=region)


class Broken:
    """In the place of a backend: its logits can be spoiled."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.facts = backend, backend.facts
        self.spoil: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda logits: logits

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.spoil(self.backend.infer(x))

    def close(self) -> None:
        self.backend.close()


@pytest.fixture
def broken(bundle: Any) -> Iterator[tuple[Predictor, Broken]]:
    with Predictor.load(bundle, runtime="onnxruntime", cache=False) as predictor:
        network = predictor._network
        assert network
        backend = Broken(network.backend)
        object.__setattr__(network, "backend", backend)
        yield predictor, backend


def latched(predictor: Predictor, image: NDArray[np.uint8], text: str) -> None:
    """The predictor gives nothing any more, and says why."""
    assert predictor.fault
    assert text in str(predictor.fault)
    tries: list[Callable[[], object]] = [
        lambda: predictor.predict(image),
        lambda: predictor.stream([image]),
        lambda: predictor.logits(np.zeros((1, 3, 224, 224), np.float32)),
    ]
    for each in tries:
        with pytest.raises(FaultError, match=r"predictor: is latched after a fault \(.*\).*Call reset\(\)"):
            each()


@pytest.mark.parametrize(
    ("value", "text"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (7.0, "golden frame: FAIL")]
)
def test_a_fault_is_latched_until_a_reset_that_passes(
    broken: tuple[Predictor, Broken], images: list[NDArray[np.uint8]], value: float, text: str
) -> None:
    predictor, backend = broken
    backend.spoil = lambda logits: logits + np.float32(value)  # another constant, but for the golden frame
    with (
        predictor.stream(itertools.cycle(images), recheck_every=3) as found,
        pytest.raises(FaultError, match="NaN or infinity" if not np.isfinite(value) else "golden frame"),
    ):
        for _ in found:
            pass
    latched(predictor, images[0], text)
    with pytest.raises(OutputError):  # still spoiled
        predictor.reset()
    latched(predictor, images[0], text)
    backend.spoil = lambda logits: logits
    predictor.reset()
    assert predictor.fault is None
    predictor.predict(images[0])


def test_what_was_made_before_a_fault_is_not_given_after_a_reset(
    broken: tuple[Predictor, Broken], images: list[NDArray[np.uint8]]
) -> None:
    """By another stream, whose mask is ready, or by a `predict` or `logits` that was in the runtime."""
    predictor, backend = broken
    entered, let_go, found = threading.Barrier(3, timeout=PATIENCE), threading.Event(), list[object]()
    other = predictor.stream(images, in_flight=1, late="wait")
    until(lambda: other._shared.line and other._shared.line[0].has_result)
    until(lambda: not predictor._users)

    def hang(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        entered.wait()
        assert let_go.wait(PATIENCE)
        return logits

    def call(which: Callable[[], object]) -> None:
        try:
            found.append(which())
        except FaultError as error:
            found.append(error)

    backend.spoil = hang
    tensor = np.zeros((1, 3, 224, 224), np.float32)
    callers = [
        threading.Thread(target=call, args=(which,))
        for which in (lambda: predictor.predict(images[0]), lambda: predictor.logits(tensor))
    ]
    for caller in callers:
        caller.start()
    entered.wait()
    predictor._latch(FaultError("golden frame", "is off"))
    let_go.set()
    for caller in callers:
        caller.join()
    assert [type(each) for each in found] == [FaultError, FaultError]
    backend.spoil = lambda logits: logits
    predictor.reset()
    predictor.predict(images[0])
    with other, pytest.raises(FaultError, match="golden frame: is off"):
        next(other)


def test_a_reset_clears_no_fault_that_came_up_meanwhile(
    broken: tuple[Predictor, Broken], images: list[NDArray[np.uint8]]
) -> None:
    predictor, backend = broken

    def fault(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        predictor._latch(FaultError("logits", "NaN"))
        return logits

    backend.spoil = fault
    with pytest.raises(FaultError, match="logits: NaN"):
        predictor.reset()
    latched(predictor, images[0], "logits: NaN")


def test_a_reset_while_a_frame_hangs_is_refused_and_so_is_closing(
    broken: tuple[Predictor, Broken], images: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, backend = broken
    monkeypatch.setattr("msa2net.runtimes.predictor._IDLE_SECONDS", 0.05)
    let_go = threading.Event()

    def hang(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        assert let_go.wait(PATIENCE)
        return logits

    backend.spoil = hang
    with (
        predictor.stream(images, in_flight=1, timeout_ms=100) as found,
        pytest.raises(FaultError, match="in the runtime for"),
    ):
        next(found)
    with pytest.raises(RuntimeUnavailableError, match=r"1 frames are still in the runtime after 0\.05 s"):
        predictor.reset()
    latched(predictor, images[0], "in the runtime for")
    let_go.set()
    until(lambda: predictor._users == 0)
    predictor.reset()
    predictor.predict(images[0])


def test_closing_that_timed_out_can_be_tried_again(
    broken: tuple[Predictor, Broken], images: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, backend = broken
    monkeypatch.setattr("msa2net.runtimes.predictor._IDLE_SECONDS", 0.05)
    let_go, freed = threading.Event(), list[int]()
    backend.spoil = lambda logits: (let_go.wait(PATIENCE), logits)[1]
    monkeypatch.setattr(backend, "close", lambda: freed.append(1))
    caller = threading.Thread(target=predictor.predict, args=(images[0],))
    caller.start()
    until(lambda: predictor._users)
    with pytest.raises(RuntimeUnavailableError, match="Close again when they have ended"):
        predictor.close()
    assert not freed
    let_go.set()
    caller.join()
    predictor.close()
    predictor.close()
    assert freed == [1]


def test_a_reset_that_fails_latches(broken: tuple[Predictor, Broken], images: list[NDArray[np.uint8]]) -> None:
    predictor, backend = broken
    backend.spoil = lambda logits: logits + np.float32(1)
    with pytest.raises(OutputError):
        predictor.reset()
    latched(predictor, images[0], "does not do what was exported")


def test_closing_the_predictor_ends_its_stream_with_an_error(bundle: Any, images: list[NDArray[np.uint8]]) -> None:
    predictor = Predictor.load(bundle, runtime="openvino", cache=False)
    with predictor.stream(itertools.cycle(images)) as found:
        next(found)
        predictor.close()
        with pytest.raises(RuntimeUnavailableError, match="predictor: is closed"):
            for _ in found:
                pass


def test_bad_frames_do_not_latch(predictors: dict[str, Predictor], images: list[NDArray[np.uint8]]) -> None:
    predictor = predictors["openvino"]
    bad = np.full((64, 64), np.nan, np.float32)
    with predictor.stream([images[0], bad, images[1]], late="wait") as found:
        assert next(found).index == 0
        with pytest.raises(Msa2NetError, match="frame"):
            next(found)
        assert next(found).index == 2
    assert predictor.fault is None
