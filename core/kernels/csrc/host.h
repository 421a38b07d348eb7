// What `masag.cu` needs of CUDA, on a CPU: to run the very same source without a GPU, under sanitizers. For tests.
//
// A block's threads are coroutines of one thread, which change places at barriers and in the instructions of a warp;
// blocks run one after the other. Shared memory is allocated for each block in its exact size and begins as NaN. Copies
// from global to shared memory happen as late as CUDA allows, or, by `host_device`, at once: what does not wait for
// them, or overwrites what is still read, gives wrong numbers or, under the thread sanitizer, a race.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the coroutine that runs

namespace host {

struct Copy {
  void* to;
  const void* from;
  bool real;
};

unsigned char* shared_memory();
void barrier();
// Gives every lane of the warp `count` words of all 32, lane by lane.
const uint32_t* exchange(const uint32_t* words, int count);
// Copies not yet due: they become due in order, when at most `left` groups may stay.
extern bool copies_at_once;
void push(const Copy& copy);
void commit();
bool pop(int left, Copy* due);
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);

template <typename T>
T bits_as(uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline void copy(const Copy& one) {
  if (one.real)
    std::memcpy(one.to, one.from, 16);
  else
    std::memset(one.to, 0, 16);
}

}  // namespace host

inline void __syncthreads() { host::barrier(); }

// Numbers ------------------------------------------------------------------------------------------------------------

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half value) { return static_cast<float>(value.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
inline float __bfloat162float(__nv_bfloat16 value) { return host::bits_as<float>(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = host::bits_of(value);
  if (std::isnan(value)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }

// Instructions, as `instructions.cuh` describes them -----------------------------------------------------------------

inline unsigned char* shared_memory() { return host::shared_memory(); }
inline void copy_async(void* to, const void* from, bool real) {
  if (host::copies_at_once)
    host::copy({to, from, real});
  else
    host::push({to, from, real});
}
inline void commit_copies() { host::commit(); }
template <int LEFT>
void wait_for_copies() {
  for (host::Copy due; host::pop(LEFT, &due);) host::copy(due);
}
inline float shuffle_xor(float value, int lanes) {
  const uint32_t word = host::bits_of(value);
  return host::bits_as<float>(host::exchange(&word, 1)[threadIdx.x % 32 ^ lanes]);
}
inline uint32_t to_tf32(uint32_t word) {
  const uint32_t special = 0x7f800000;
  return (word & special) == special ? word : (word + 0x1000) & ~0x1fffu;
}

namespace host {

// Element `i` of a word; tf32 is read as the hardware does, without its last 13 bits.
template <typename T>
float element(uint32_t word, int i);
template <>
inline float element<float>(uint32_t word, int) {
  return bits_as<float>(word & ~0x1fffu);
}
template <>
inline float element<__half>(uint32_t word, int i) {
  return __half2float(bits_as<__half>(word >> 16 * i));
}
template <>
inline float element<__nv_bfloat16>(uint32_t word, int i) {
  return bits_as<float>(word >> 16 * i << 16);
}

}  // namespace host

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t* all = host::exchange(mine, 6);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int word = 0; word < 8; ++word) {
      const uint32_t of_a = all[(row % 8 * 4 + word % 4) * 6 + row / 8 + word / 4 * 2];
      const uint32_t of_b = all[(column * 4 + word % 4) * 6 + 4 + word / 4];
      for (int j = 0; j < int(4 / sizeof(T)); ++j) d[i] += host::element<T>(of_a, j) * host::element<T>(of_b, j);
    }
  }
}

// The runtime --------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
enum cudaMemoryType { cudaMemoryTypeUnregistered = 0, cudaMemoryTypeHost = 1, cudaMemoryTypeDevice = 2 };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  const void* devicePointer;
};
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  struct CUstream_st* stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t host_launch_error();

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return host_launch_error();
}

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  if (const cudaError_t error = host_launch_error(); error != cudaSuccess) return error;
  host::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
