// The gate as an operator of PyTorch, `torch.ops.msa2net.masag_cuda`. It uses PyTorch's stable ABI alone, so that one
// library serves 2.13 and what follows. `../operator.py` checks the arguments and gives the gradients.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "masag.h"

#ifdef MASAG_ON_HOST  // see host.h
#define MASAG_DEVICE CPU
#else
#define MASAG_DEVICE CUDA
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require(bool held, const std::string& message) {
  if (!held) throw std::runtime_error(message);
}

void require(masag_status status) { require(status == MASAG_OK, status == MASAG_OK ? "" : masag_last_error()); }

// The address of a contiguous tensor of `count` elements that is like x.
const void* address(const char* name, const Tensor& tensor, int64_t count, const Tensor& x) {
  require(tensor.numel() == count && tensor.is_contiguous() && tensor.scalar_type() == x.scalar_type() &&
              tensor.is_cuda() == x.is_cuda() && tensor.get_device_index() == x.get_device_index(),
          std::string(name) + ": expected a contiguous tensor of " + std::to_string(count) +
              " elements, of x's dtype and device");
  return tensor.data_ptr();
}

masag_map map_of(const Tensor& tensor) {
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

Tensor masag(const Tensor& x, const Tensor& g, const Tensor& depthwise, const Tensor& depthwise_bias,
             const Tensor& dilated, const Tensor& dilated_bias, const Tensor& u, const Tensor& context,
             const Tensor& projection, const Tensor& projection_bias, const Tensor& output, const Tensor& output_bias,
             const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, bool tf32) {
  require(x.dim() == 4 && g.dim() == 4, "x, g: expected (B, C, H, W)");
  for (int i = 0; i < 4; ++i) require(x.size(i) == g.size(i), "g: expected the shape of x");
  require(
      g.scalar_type() == x.scalar_type() && g.get_device_index() == x.get_device_index() && g.is_cuda() == x.is_cuda(),
      "g: expected x's dtype and device");
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
          "x: expected float32, float16 or bfloat16");
  const masag_problem problem{x.size(0),
                              x.size(1),
                              x.size(2),
                              x.size(3),
                              type == ScalarType::Float  ? MASAG_FLOAT32
                              : type == ScalarType::Half ? MASAG_FLOAT16
                                                         : MASAG_BFLOAT16,
                              tf32};
  const int64_t c = x.size(1);
  const masag_weights weights{
      address("depthwise", depthwise, 9 * c, x),
      address("depthwise_bias", depthwise_bias, c, x),
      address("dilated", dilated, 9 * c * c, x),
      address("dilated_bias", dilated_bias, c, x),
      address("u", u, c, x),
      address("context", context, 3, x),
      address("projection", projection, c * c, x),
      address("projection_bias", projection_bias, c, x),
      address("output", output, c * c, x),
      address("output_bias", output_bias, c, x),
      norm_weight ? address("norm_weight", *norm_weight, c, x) : nullptr,
      norm_bias ? address("norm_bias", *norm_bias, c, x) : nullptr,
  };
#ifdef MASAG_ON_HOST
  const cudaStream_t stream = nullptr;
#else
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream =
      static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(x.get_device_index()).nativeHandle());
#endif
  size_t bytes = 0;
  require(masag_workspace_size(&problem, &bytes));
  const std::array<int64_t, 1> flat{static_cast<int64_t>(bytes)};
  const Tensor workspace = torch::stable::new_empty(x, flat, ScalarType::Byte);
  const std::array<int64_t, 4> planes{x.size(0), c, x.size(2), x.size(3)}, tokens{x.size(0), x.size(2), x.size(3), c};
  Tensor out = torch::stable::new_empty(x, norm_weight ? tokens : planes);
  const masag_map x_map = map_of(x), g_map = map_of(g);
  require(masag_forward(&problem, &x_map, &g_map, &weights, out.data_ptr(), workspace.data_ptr(), bytes, stream));
  if (!norm_weight) return out;
  out = torch::stable::transpose(out, 1, 3);  // (B, C, W, H)
  return torch::stable::transpose(out, 2, 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(msa2net, library) {
  library.def(
      "masag_cuda(Tensor x, Tensor g, Tensor depthwise, Tensor depthwise_bias, Tensor dilated, Tensor dilated_bias, "
      "Tensor u, Tensor context, Tensor projection, Tensor projection_bias, Tensor output, Tensor output_bias, "
      "Tensor? norm_weight, Tensor? norm_bias, bool tf32) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(msa2net, MASAG_DEVICE, library) { library.impl("masag_cuda", TORCH_BOX(&masag)); }
