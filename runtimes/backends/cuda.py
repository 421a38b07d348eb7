"""CUDA by NVIDIA's cuda-python: a GPU, buffers on both sides, a stream, and a graph of one inference. No PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import gpu_index, nvidia_driver


def call(what: str, result: tuple[Any, ...]) -> Any:
    """What a CUDA call returned beside its status. Raises RuntimeError with CUDA's own words."""
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        name, text = (
            found[1].decode() for found in (cudart.cudaGetErrorName(status), cudart.cudaGetErrorString(status))
        )
        raise RuntimeError(f"{what}: {text} ({name})")
    return values[0] if len(values) == 1 else values


class Gpu:
    """`name`, `capability` such as "8.6", and `driver` (the newest CUDA that it runs, its own name), of "cuda:N".

    Raises RuntimeUnavailableError, of `runtime`, for another device, without a driver, and for a GPU that is not there.
    """

    def __init__(self, runtime: str, device: str) -> None:
        place = f"runtime {runtime!r}"
        self.index = gpu_index(runtime, device)
        try:
            count = call("cudaGetDeviceCount", cudart.cudaGetDeviceCount())
        except RuntimeError as error:
            raise RuntimeUnavailableError(
                place, f"no GPU can be used ({error})", "expected an NVIDIA driver and a GPU", "Install the driver."
            ) from error
        if self.index >= count:
            raise RuntimeUnavailableError(
                place, f"got device {device!r}", f"expected a number below {count}, that of the GPUs", "Check it."
            )
        about = call("cudaGetDeviceProperties", cudart.cudaGetDeviceProperties(self.index))
        name = about.name
        self.name: str = (name.decode() if isinstance(name, bytes) else name).rstrip("\0")
        self.capability = f"{about.major}.{about.minor}"
        version = call("cudaDriverGetVersion", cudart.cudaDriverGetVersion())
        self.driver = f"{version // 1000}.{version % 1000 // 10} {nvidia_driver()}".strip()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes it the GPU of the calling thread, for as long."""
        before = call("cudaGetDevice", cudart.cudaGetDevice())
        call("cudaSetDevice", cudart.cudaSetDevice(self.index))
        try:
            yield
        finally:
            cudart.cudaSetDevice(before)


class Buffer:
    """A float32 array of `shape` twice: `array`, in page-locked memory, and at the address `device` on the GPU."""

    def __init__(self, shape: tuple[int, ...], owner: ExitStack) -> None:
        self._bytes = int(np.prod(shape)) * 4
        what = f"{self._bytes / 1e6:.1f} MB"
        self.device: int = call(f"{what} of GPU memory", cudart.cudaMalloc(self._bytes))
        owner.callback(cudart.cudaFree, self.device)
        self._host: int = call(f"{what} of page-locked memory", cudart.cudaHostAlloc(self._bytes, 0))
        owner.callback(cudart.cudaFreeHost, self._host)
        flat = (ctypes.c_float * (self._bytes // 4)).from_address(self._host)
        self.array: NDArray[np.float32] = np.ctypeslib.as_array(flat).reshape(shape)

    def to_device(self, stream: Any) -> None:
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        call("copy to the GPU", cudart.cudaMemcpyAsync(self.device, self._host, self._bytes, kind, stream))

    def to_host(self, stream: Any) -> None:
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("copy from the GPU", cudart.cudaMemcpyAsync(self._host, self.device, self._bytes, kind, stream))


class Stream:
    """A stream, at the address `handle`, on which `capture`d work is launched as one CUDA graph."""

    def __init__(self, owner: ExitStack) -> None:
        self._owner = owner
        self._stream = call("stream", cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        owner.callback(cudart.cudaStreamDestroy, self._stream)

    @property
    def raw(self) -> Any:
        return self._stream

    @property
    def handle(self) -> int:
        return int(self._stream)

    def synchronize(self) -> None:
        call("inference", cudart.cudaStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What launches as a graph that which `work` enqueues. Raises RuntimeError if it cannot be captured."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("capture", cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        except BaseException:
            status, graph = cudart.cudaStreamEndCapture(self._stream)
            if status == cudart.cudaError_t.cudaSuccess:
                cudart.cudaGraphDestroy(graph)
            raise
        graph = call("capture", cudart.cudaStreamEndCapture(self._stream))
        try:
            instance = call("graph", cudart.cudaGraphInstantiate(graph, 0))
        finally:
            cudart.cudaGraphDestroy(graph)
        self._owner.callback(cudart.cudaGraphExecDestroy, instance)
        return lambda: call("launch", cudart.cudaGraphLaunch(instance, self._stream))
