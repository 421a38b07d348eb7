"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, require_fp32_cpu
from msa2net.runtimes.bundle import Manifest

PROVIDER = "CPUExecutionProvider"
_ERRORS_ONLY = 3


class OnnxRuntimeBackend:
    """See `msa2net.runtimes.backends`."""

    def __init__(self, files: tuple[str, ...], manifest: Manifest, device: str, precision: str, threads: int) -> None:
        require_fp32_cpu("onnxruntime", device, precision)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        # Idle threads sleep: a device has other work to do between two frames.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(files[0], options, providers=[PROVIDER])
        except Exception as error:  # its exception classes share no other base
            raise RuntimeUnavailableError(
                "runtime 'onnxruntime'", f"cannot load the model ({error})", "", "Update onnxruntime, or export again."
            ) from error
        # It drops a provider that fails to load without an error, so what it really uses is read back.
        if session.get_providers() != [PROVIDER]:
            raise RuntimeUnavailableError(
                "runtime 'onnxruntime'",
                f"runs on {session.get_providers()}",
                f"expected [{PROVIDER!r}]",
                "Reinstall onnxruntime alone, without onnxruntime-gpu.",
            )
        self._session = session
        self._input = session.get_inputs()[0].name
        self.facts = Facts(
            version=onnxruntime.__version__,
            device="CPU",
            provider=PROVIDER,
            precision=precision,  # a graph of floats runs in fp32 on this provider: the artifact fixes it
            threads=threads,
        )

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", self._session.run(None, {self._input: x})[0])

    def close(self) -> None:
        del self._session
