"""What Torch-TensorRT makes of the network, without a GPU: `make torch-tensorrt` runs it in an environment of its own.

It prints, for each network, the share of operators that Torch-TensorRT would put into TensorRT, in how many engines,
and the size of the engine that the whole is converted to. Torch-TensorRT asks PyTorch about a GPU at every turn: it
gets answers that describe one, and as an engine cannot be loaded without a driver, its bytes are kept as they are.
Nothing is run: whether the engine is right or fast, this does not show.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

CAPABILITY = (8, 6)


def pretend_gpu() -> None:
    """Makes PyTorch describe a GPU, before Torch-TensorRT is imported."""
    about = SimpleNamespace(
        name="a GPU that is not there",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=8 << 30,
        multi_processor_count=28,
    )
    answers = {
        "get_device_capability": CAPABILITY,
        "current_device": 0,
        "get_device_properties": about,
        "get_device_name": about.name,
        "mem_get_info": (8 << 30, 8 << 30),
        "empty_cache": None,
        "synchronize": None,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = SimpleNamespace  # type: ignore[attr-defined]
    # Its own library of operators is built for CUDA and cannot be loaded.
    there = os.path.isfile
    os.path.isfile = lambda path: "libtorchtrt" not in str(path) and there(path)


@contextmanager
def engine_bytes() -> Iterator[None]:
    """In place of TensorRT's runtime, which needs a driver, one that hands the engine back unread."""
    import tensorrt as trt
    import torch_tensorrt.dynamo.conversion._TRTInterpreter as interpreter

    class Kept:
        def __init__(self, engine: Any) -> None:
            self.engine = bytes(engine)

        def serialize(self) -> bytes:
            return self.engine

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, engine: Any) -> Kept:
            return Kept(engine)

    before = trt.Runtime
    interpreter.trt.Runtime = Runtime
    try:
        yield
    finally:
        interpreter.trt.Runtime = before


def report(model: torch.nn.Module) -> dict[str, Any]:
    """Operators in all and in TensorRT, engines, and the engine that the whole is converted to: bytes and seconds."""
    import torch_tensorrt
    from torch_tensorrt.dynamo import _compiler as compiler

    from msa2net.runtimes.backends.torch_tensorrt import SETTINGS, exported

    image = torch.randn(1, 3, 224, 224)
    program = exported(model, image)
    found: list[Any] = []
    compiler.dryrun_stats_display = lambda tracker, _: found.append(tracker)
    # With full compilation there is one engine or an error, so the share of each is asked for without it.
    torch_tensorrt.dynamo.compile(
        program, arg_inputs=[image], dryrun=True, **SETTINGS | {"require_full_compilation": False}
    )
    start = time.perf_counter()
    with engine_bytes():
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program, arg_inputs=[image], **SETTINGS
        )
    (about,) = found
    return {
        "operators": about.total_ops_in_graph,
        "in TensorRT": about.supported_ops_in_graph,
        "engines": about.tensorrt_graph_count,
        "left over": {str(key): count for key, count in about.unsupported_ops.items()},
        "bytes": len(engine),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    pretend_gpu()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from msa2net.core import DEEP_DECODERS, VARIANTS, MSA2Net

    whole = True
    print(f"{'network':<24}{'operators':>10}{'in TensorRT':>13}{'engines':>9}{'MB':>8}{'seconds':>9}  left over")
    for variant in ("tiny", "small"):
        for form in DEEP_DECODERS:
            torch.manual_seed(0)
            config = dataclasses.replace(VARIANTS[variant], deep_decoder=form)
            row = report(MSA2Net(config).eval())
            share = row["in TensorRT"] / row["operators"]
            whole &= share == 1 and row["engines"] == 1
            print(
                f"{variant + ' ' + form:<24}{row['operators']:>10}{share:>13.2%}{row['engines']:>9}"
                f"{row['bytes'] / 1e6:>8.1f}{row['seconds']:>9.1f}  {row['left over'] or '-'}",
                flush=True,
            )
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
