"""fp16 as Arm's kernels compute it: what a convolution or a product adds up is rounded to fp16 at each of its terms.

`fp16.emulated` takes sums in fp32, as tensor cores do. On an emulated Cortex-A76 a logit of the demo was 0.177 from the
reference where that has 0.064 and this 0.211. It is slow, seconds for an image through the demo and minutes through the
full network: for golden frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional

from msa2net.export import fp16
from msa2net.export.precision import Infer, Logits


def emulation(file: Path) -> Infer:
    """Runs an ONNX file in fp16; what it has in fp32 stays in it."""
    model = onnx.load(file)
    halves = {name for name, (kind, _) in fp16.typed_shapes(model).items() if kind == fp16.HALF}
    emulated = fp16.emulated(model)
    in_half = {node.name for node in model.graph.node if halves.issuperset(node.output)}
    for node in emulated.graph.node:
        if node.name in in_half and f"Fp16{node.op_type}" in _KINDS:
            node.domain, node.op_type = _Summing.op_domain, f"Fp16{node.op_type}"
    emulated.opset_import.append(helper.make_opsetid(_Summing.op_domain, 1))
    evaluator, image = ReferenceEvaluator(emulated, new_ops=list(_KINDS.values())), model.graph.input[0].name

    def infer(x: Logits) -> Logits:
        with np.errstate(over="ignore", invalid="ignore"):  # its Sigmoid computes both cases and takes one
            return cast("list[Logits]", evaluator.run(None, {image: x}))[0]

    return infer


def product(a: Tensor, b: Tensor) -> Tensor:
    """(..., M, K), (..., K, N) -> (..., M, N); numbers that fp16 holds, as float32."""
    a, b = a.half(), b.half()
    total = a.new_zeros(*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    for k in range(a.shape[-1]):  # computed in fp32 and then rounded
        torch.addcmul(total, a[..., :, k, None], b[..., k, None, :], out=total)
    return total.float()


class _Summing(OpRun):
    op_domain = "fp16"

    def _run(
        self, a: NDArray[np.float32], b: NDArray[np.float32], bias: NDArray[np.float32] | None = None, **given: Any
    ) -> tuple[NDArray[np.float32]]:
        added = torch.zeros(1) if bias is None else torch.tensor(bias)
        return (self.total(torch.tensor(a), torch.tensor(b), added, given).numpy(),)

    def total(self, a: Tensor, b: Tensor, bias: Tensor, given: dict[str, Any]) -> Tensor:
        """What the node gives; `given` are its attributes, None if it has not said."""
        raise NotImplementedError


class Fp16MatMul(_Summing):
    def total(self, a: Tensor, b: Tensor, bias: Tensor, given: dict[str, Any]) -> Tensor:
        return product(a, b)


class Fp16Gemm(_Summing):
    def total(self, a: Tensor, b: Tensor, bias: Tensor, given: dict[str, Any]) -> Tensor:
        alpha, beta = (1.0 if given.get(name) is None else given[name] for name in ("alpha", "beta"))
        return alpha * product(a.T if given.get("transA") else a, b.T if given.get("transB") else b) + beta * bias


class Fp16Conv(_Summing):
    def total(self, a: Tensor, b: Tensor, bias: Tensor, given: dict[str, Any]) -> Tensor:
        top, left, bottom, right = given.get("pads") or (0, 0, 0, 0)
        steps, gaps = given.get("strides") or (1, 1), given.get("dilations") or (1, 1)
        groups, count, (height, width) = given.get("group") or 1, len(b), b.shape[2:]
        a = functional.pad(a, (left, right, top, bottom))
        rows = (a.shape[2] - gaps[0] * (height - 1) - 1) // steps[0] + 1
        columns = functional.unfold(a, (height, width), dilation=gaps, stride=steps)
        columns = columns.reshape(len(a), groups, -1, columns.shape[-1])
        total = product(b.reshape(groups, count // groups, -1), columns)
        return total.reshape(len(a), count, rows, -1) + bias.reshape(-1, 1, 1)


_KINDS = {kind.__name__: kind for kind in (Fp16MatMul, Fp16Gemm, Fp16Conv)}
