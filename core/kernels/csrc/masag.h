/* MASAG, the gate of MSA2Net, fused for NVIDIA GPUs of compute capability 8.0 or newer: a C API without PyTorch.
 *
 * `../reference.py` has the equations and folds a trained gate into the weights below. Build, with CUDA 11.8 or newer:
 *
 *     nvcc -std=c++17 -O3 -arch=sm_87 -shared -Xcompiler -fPIC masag.cu -o libmasag.so
 *
 * Every pointer to data is to memory of the current device, or to managed or page-locked memory that it reaches. The
 * library allocates nothing and keeps no state but the last message of each thread; calls from several threads need a
 * workspace each. The three launches of a gate go to one stream and can be captured in a CUDA graph.
 */
#ifndef MASAG_H
#define MASAG_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st* cudaStream_t; /* as in the CUDA headers, which this one does not need */

typedef enum {
  MASAG_OK = 0,
  MASAG_INVALID_ARGUMENT = 1, /* the message names it */
  MASAG_UNSUPPORTED = 2,      /* by this library: the GPU, the number of channels or of pixels */
  MASAG_CUDA_ERROR = 3        /* a CUDA call failed; the message has its text */
} masag_status;

typedef enum { MASAG_FLOAT32 = 0, MASAG_FLOAT16 = 1, MASAG_BFLOAT16 = 2 } masag_dtype;

enum { MASAG_MOST_CHANNELS = 384, MASAG_MOST_PIXELS = 1 << 30 };

/* All sizes at least 1; `batch * height * width` at most MASAG_MOST_PIXELS, `channels` at most MASAG_MOST_CHANNELS. */
typedef struct {
  int64_t batch, channels, height, width;
  int32_t dtype; /* a masag_dtype: of every map and weight */
  int32_t tf32; /* not 0: products of float32 in tf32, 10 bits of mantissa; else IEEE. Of other dtypes without effect */
} masag_problem;

/* (batch, channels, height, width); strides in elements, not negative. */
typedef struct {
  const void* data;
  int64_t strides[4];
} masag_map;

/* Contiguous, in the shapes given; C channels. */
typedef struct {
  const void* depthwise;       /* (9, C): tap by tap, row by row */
  const void* depthwise_bias;  /* (C) */
  const void* dilated;         /* (9, C, C): tap, output channel, input channel */
  const void* dilated_bias;    /* (C) */
  const void* u;               /* (C) */
  const void* context;         /* (3): alpha, beta, gamma */
  const void* projection;      /* (C, C): output, input channel */
  const void* projection_bias; /* (C) */
  const void* output;          /* (C, C) */
  const void* output_bias;     /* (C) */
  const void* norm_weight;     /* (C), or null: see masag_forward */
  const void* norm_bias;       /* (C), or null, as norm_weight is */
} masag_weights;

/* Whether this library has been built for the current device and its driver is new enough: MASAG_OK, or
 * MASAG_UNSUPPORTED with the reason. */
masag_status masag_check_device(void);

/* Bytes of workspace that masag_forward needs for this problem, on any device. */
masag_status masag_workspace_size(const masag_problem* problem, size_t* bytes);

/* Enqueues the gate of the skip map x and the decoder's map g on `stream`.
 *
 * - `out`: without a norm the gate, contiguous (batch, channels, height, width); with one LayerNorm(g + gate),
 *   contiguous (batch, height, width, channels). It overlaps nothing that is read, nor the workspace.
 * - `workspace`: at least masag_workspace_size bytes, aligned to 16, that overlap nothing else; free for other use when
 *   the stream is past the gate.
 *
 * What it cannot do is refused before anything is enqueued. The caller sees to it that memory is as large as it says.
 * Call it once before a capture in a CUDA graph: CUDA loads a kernel at its first launch, which a capture may forbid.
 */
masag_status masag_forward(const masag_problem* problem, const masag_map* x, const masag_map* g,
                           const masag_weights* weights, void* out, void* workspace, size_t workspace_bytes,
                           cudaStream_t stream);

/* What the build named its sources by (`python -m msa2net.core.kernels.build`: their SHA-256); empty otherwise. */
const char* masag_sources(void);

/* What went wrong in this thread's last call that did not return MASAG_OK; never null. */
const char* masag_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
