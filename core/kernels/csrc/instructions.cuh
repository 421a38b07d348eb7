// The instructions that C++ has no words for; `host.h` has the same for a CPU.
#pragma once

#ifndef __CUDACC__
#include "host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// The launch's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Starts to copy 16 bytes from global to shared memory, or to fill them with zeros; the source is then not read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(real ? 16 : 0)
               : "memory");
}

// The copies started since the last call become a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `LEFT` of this thread's groups have arrived.
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); }

// Rounded to tf32, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(uint32_t word) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
  return rounded;
}

// d += A B of a warp, A 16 rows and B 8 columns of eight 32-bit words each: 8 of tf32 or 16 of two bytes.
// With lane = 4 g + t:  a = A's words (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b = B's words t and t + 4 of
// column g;  d = rows g and g + 8, columns 2 t and 2 t + 1. (PTX ISA, mma.m16n8k16 and m16n8k8.)
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define MASAG_MULTIPLY_ADD(TYPE, NAME)                                                                             \
  template <>                                                                                                      \
  __device__ __forceinline__ void multiply_add<TYPE>(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) { \
    asm volatile("mma.sync.aligned." NAME " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
  }
MASAG_MULTIPLY_ADD(__half, "m16n8k16.row.col.f32.f16.f16.f32")
MASAG_MULTIPLY_ADD(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
MASAG_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef MASAG_MULTIPLY_ADD

#endif
