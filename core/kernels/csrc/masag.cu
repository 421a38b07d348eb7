// The collapsed gate in three CUDA kernels, see `../reference.py` for its equations and `masag.h` for the C API.
//
// 1. context_kernel   t = relu(depthwise3x3(x)), and alpha mean(g) + beta max(g) + gamma of every pixel
// 2. dilated_kernel   u . relu(dilated3x3(t)): the dilated convolution as a product of N pixels by 9 C inputs. Its C
//                     channels stay in registers; of each tile of channels one number a pixel is written
// 3. gate_kernel      sums these, selects, modulates, and runs both 1 x 1 convolutions with what is between them in
//                     shared memory; with a norm also the residual sum and the LayerNorm
//
// Sums are in fp32 whatever the dtype, each in one order, so that equal inputs give equal bits. No kernel takes more
// than 48 KiB of shared memory, which every GPU gives without being asked.
//
// B batch, C channels, H W rows and columns, N = B H W pixels, T the dtype. A word is 32 bits, a slab 8 words.

#include <cstdarg>
#include <cstdio>

#include "instructions.cuh"
#include "masag.h"

namespace {

constexpr int WARP = 32;
constexpr int SLAB = 8;  // words: what one step of a product reads of a row
constexpr size_t SHARED_LIMIT = 48 * 1024;
constexpr float EPSILON = 1e-5f;  // of the LayerNorm

// Values -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
constexpr int PER_WORD = 4 / sizeof(T);

__device__ __forceinline__ float relu(float z) { return z < 0 ? 0 : z; }  // NaN stays NaN; fmaxf would hide it
__device__ __forceinline__ float sigmoid(float z) { return 1 / (1 + expf(-z)); }
__device__ __forceinline__ float silu(float z) { return z * sigmoid(z); }

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

struct Sizes {
  int pixels, channels, height, width;
  // Channels of a pixel of t: whole copies of 16 bytes. Those beyond `channels` are 0.
  __host__ __device__ int padded() const { return divide_up(channels, 8) * 8; }
};

// Where a pixel is.
struct Place {
  int image, row, column;
  __device__ Place(int pixel, const Sizes& of)
      : image(pixel / (of.height * of.width)), row(pixel / of.width % of.height), column(pixel % of.width) {}
};

// A map (B, C, H, W) of any strides.
template <typename T>
struct Map {
  const T* data;
  int64_t b, c, h, w;

  explicit Map(const masag_map& map)
      : data(static_cast<const T*>(map.data)),
        b(map.strides[0]),
        c(map.strides[1]),
        h(map.strides[2]),
        w(map.strides[3]) {}
  // Its first channel at a pixel.
  __device__ const T* at(const Place& place) const { return data + place.image * b + place.row * h + place.column * w; }
};

// Products -----------------------------------------------------------------------------------------------------------
//
// A warp multiplies 16 MT rows of A by 8 NT rows of B, both with the inputs of a row beside one another. `A` and `B`
// give word(row, i), and four(row, i): the words 4 i to 4 i + 3. The sums lie over the lanes as `multiply_add` has
// them, on tensor cores and off them:

// The row and column, within its 16 by 8 tile, of sum `i` of a lane.
__device__ __forceinline__ int row_of(int i, int lane) { return lane / 4 + i / 2 * 8; }
__device__ __forceinline__ int column_of(int i, int lane) { return lane % 4 * 2 + i % 2; }

// Adds the products of one slab.
template <typename T, bool TENSOR, int MT, int NT, typename A, typename B>
__device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], const A& a, const B& b, int slab, int lane) {
  if constexpr (TENSOR) {
    const int g = lane / 4, first = slab * SLAB + lane % 4, second = first + 4;
    const auto word = [](uint32_t value) { return sizeof(T) == 4 ? to_tf32(value) : value; };
    uint32_t rows[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      rows[m][0] = word(a.word(16 * m + g, first));
      rows[m][1] = word(a.word(16 * m + g + 8, first));
      rows[m][2] = word(a.word(16 * m + g, second));
      rows[m][3] = word(a.word(16 * m + g + 8, second));
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint32_t columns[2] = {word(b.word(8 * n + g, first)), word(b.word(8 * n + g, second))};
#pragma unroll
      for (int m = 0; m < MT; ++m) multiply_add<T>(sums[m][n], rows[m], columns);
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int four = slab * 2 + half;
      float4 rows[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        rows[m][0] = a.four(16 * m + row_of(0, lane), four);
        rows[m][1] = a.four(16 * m + row_of(2, lane), four);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 column = b.four(8 * n + column_of(j, lane), four);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& sum = sums[m][n][2 * i + j];
              sum = fmaf(rows[m][i].x, column.x, sum);
              sum = fmaf(rows[m][i].y, column.y, sum);
              sum = fmaf(rows[m][i].z, column.z, sum);
              sum = fmaf(rows[m][i].w, column.w, sum);
            }
          }
        }
      }
    }
  }
}

// Of a row's four lanes: the sum.
__device__ __forceinline__ float sum_of_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// Rows of `BYTES` in shared memory, copied 16 bytes at a time. The copies of neighbouring rows are stored in another
// order, so that a warp's rows fall into different banks.
template <int BYTES>
struct Swizzled {
  static constexpr int COPIES = BYTES / 16;
  static_assert(COPIES == 4 || COPIES == 8);
  unsigned char* rows;

  __device__ unsigned char* copy(int row, int i) const {
    return rows + row * BYTES + (i ^ (COPIES == 8 ? row % 8 : row / 2 % 4)) * 16;
  }
  __device__ uint32_t word(int row, int i) const { return reinterpret_cast<const uint32_t*>(copy(row, i / 4))[i % 4]; }
  __device__ float4 four(int row, int i) const { return *reinterpret_cast<const float4*>(copy(row, i)); }
};

// Rows of whole slabs and four words more, which does the same.
struct Spaced {
  uint32_t* rows;
  int pitch;  // words

  __device__ uint32_t word(int row, int i) const { return rows[row * pitch + i]; }
  __device__ float4 four(int row, int i) const { return *reinterpret_cast<const float4*>(rows + row * pitch + 4 * i); }
};

// Rows of a (C, C) matrix in global memory from `first` on. Without WHOLE, what is beyond its last row or column is 0.
template <typename T, bool WHOLE>
struct Matrix {
  const T* data;
  int channels, first;

  __device__ uint32_t word(int row, int i) const {
    const T* from = data + (first + row) * channels + i * PER_WORD<T>;
    if constexpr (WHOLE) return *reinterpret_cast<const uint32_t*>(from);
    union {
      T values[PER_WORD<T>];
      uint32_t all;
    } word;
    word.all = 0;
    for (int j = 0; j < PER_WORD<T>; ++j)
      if (first + row < channels && i * PER_WORD<T> + j < channels) word.values[j] = from[j];
    return word.all;
  }
  __device__ float4 four(int row, int i) const {
    const T* from = data + (first + row) * channels + 4 * i;
    if constexpr (WHOLE) return *reinterpret_cast<const float4*>(from);
    float values[4] = {};
    for (int j = 0; j < 4; ++j)
      if (first + row < channels && 4 * i + j < channels) values[j] = widen(from[j]);
    return {values[0], values[1], values[2], values[3]};
  }
};

// Kernels ------------------------------------------------------------------------------------------------------------

constexpr int CONTEXT_TILE = 32;  // pixels, and channels
constexpr int CONTEXT_SLICES = 8;
constexpr int CONTEXT_THREADS = CONTEXT_TILE * CONTEXT_SLICES;
constexpr size_t CONTEXT_SHARED = CONTEXT_TILE * (CONTEXT_TILE + 1) * sizeof(float);

// Grid: tiles of pixels by tiles of channels, and one row of tiles more for g. With `across` neighbouring threads take
// neighbouring channels, else neighbouring pixels: what lies side by side in memory. The sums are the same.
template <typename T>
__global__ void __launch_bounds__(CONTEXT_THREADS)
    context_kernel(Map<T> x, Map<T> g, const T* weight, const T* bias, const T* context_weight, T* t, float* context,
                   Sizes sizes, bool x_across, bool g_across) {
  auto shared = reinterpret_cast<float*>(shared_memory());
  const int first_pixel = blockIdx.x * CONTEXT_TILE;
  const int slow = threadIdx.x / CONTEXT_TILE, fast = threadIdx.x % CONTEXT_TILE;
  if (blockIdx.y + 1 < gridDim.y) {
    const int first_channel = blockIdx.y * CONTEXT_TILE;
    for (int i = slow; i < CONTEXT_TILE; i += CONTEXT_SLICES) {
      const int p = x_across ? i : fast, c = x_across ? fast : i;
      const int pixel = first_pixel + p, channel = first_channel + c;
      float sum = 0;
      if (pixel < sizes.pixels && channel < sizes.channels) {
        const Place place(pixel, sizes);
        const T* here = x.at(place) + channel * x.c;
        for (int tap = 0; tap < 9; ++tap) {
          const int down = tap / 3 - 1, right = tap % 3 - 1;
          const int row = place.row + down, column = place.column + right;
          if (row >= 0 && row < sizes.height && column >= 0 && column < sizes.width)
            sum = fmaf(widen(here[down * x.h + right * x.w]), widen(weight[tap * sizes.channels + channel]), sum);
        }
        sum = relu(sum + widen(bias[channel]));
      }
      shared[p * (CONTEXT_TILE + 1) + c] = sum;
    }
    __syncthreads();
    for (int p = slow; p < CONTEXT_TILE; p += CONTEXT_SLICES) {
      const int pixel = first_pixel + p, channel = first_channel + fast;
      if (pixel < sizes.pixels && channel < sizes.padded())
        t[int64_t(pixel) * sizes.padded() + channel] = narrow<T>(shared[p * (CONTEXT_TILE + 1) + fast]);
    }
  } else {
    const int p = g_across ? threadIdx.x / CONTEXT_SLICES : fast;
    const int slice = g_across ? threadIdx.x % CONTEXT_SLICES : slow;
    float* totals = shared;
    float* largests = shared + CONTEXT_THREADS;
    float total = 0, largest = -INFINITY;
    if (first_pixel + p < sizes.pixels) {
      const T* here = g.at(Place(first_pixel + p, sizes));
      for (int channel = slice; channel < sizes.channels; channel += CONTEXT_SLICES) {
        const float value = widen(here[channel * g.c]);
        total += value;
        largest = fmaxf(largest, value);
      }
    }
    totals[slice * CONTEXT_TILE + p] = total;
    largests[slice * CONTEXT_TILE + p] = largest;
    __syncthreads();
    const int pixel = first_pixel + threadIdx.x;
    if (threadIdx.x < CONTEXT_TILE && pixel < sizes.pixels) {
      total = 0, largest = -INFINITY;
      for (int i = 0; i < CONTEXT_SLICES; ++i) {
        total += totals[i * CONTEXT_TILE + threadIdx.x];
        largest = fmaxf(largest, largests[i * CONTEXT_TILE + threadIdx.x]);
      }
      // A NaN that the maximum hid is in the sum.
      context[pixel] = widen(context_weight[0]) * (total / sizes.channels) + widen(context_weight[1]) * largest +
                       widen(context_weight[2]);
    }
  }
}

// How a block of `dilated_kernel` shares its tile: warps along pixels, channels and inputs, each MT by NT tiles of 16
// pixels by 8 channels; ROW bytes of each pixel's and channel's inputs at a time, STAGES of them on their way.
template <int WARPS_M, int WARPS_N, int WARPS_K, int MT_, int NT_, int ROW_, int STAGES_>
struct Tile {
  static constexpr int MT = MT_, NT = NT_, ROW = ROW_, STAGES = STAGES_;
  static constexpr int ALONG_M = WARPS_M, ALONG_N = WARPS_N, ALONG_K = WARPS_K;
  static constexpr int PIXELS = 16 * MT * WARPS_M, CHANNELS = 8 * NT * WARPS_N;
  static constexpr int THREADS = WARP * WARPS_M * WARPS_N * WARPS_K;
  static constexpr int STAGE = (PIXELS + CHANNELS) * ROW;
  static constexpr int COPIES = ROW / 16;
  static_assert(size_t(STAGE) * STAGES <= SHARED_LIMIT);
  // After the product this memory is for sums.
  static_assert((WARPS_K - 1) * PIXELS * CHANNELS + WARPS_N * PIXELS <= STAGE * STAGES / int(sizeof(float)));
  static_assert(PIXELS * COPIES % THREADS == 0, "each thread copies parts of the same pixels all the time");
};
// From the smallest to the largest. Channels of the released gates are multiples of 96.
using Tiny = Tile<1, 1, 4, 1, 4, 128, 4>;       // 16 pixels by 32 channels, every warp a quarter of the inputs
using Small = Tile<2, 2, 1, 1, 3, 128, 4>;      // 32 by 48
using Medium = Tile<2, 2, 1, 2, 6, 64, 4>;      // 64 by 96
using Large = Tile<4, 2, 1, 2, 6, 64, 3>;       // 128 by 96
constexpr int LEAST_CHANNELS = Tiny::CHANNELS;  // so that no tile needs a larger workspace

// Grid: tiles of pixels by tiles of channels. `aligned`: every row of the weights begins at a multiple of 16 bytes.
template <typename T, bool TENSOR, typename Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    dilated_kernel(const T* t, const T* weight, const T* bias, const T* u, float* partial, Sizes sizes, bool aligned) {
  constexpr int MT = Tile::MT, NT = Tile::NT, COPIES = Tile::COPIES, PER_COPY = 16 / sizeof(T);
  constexpr int SHARE = Tile::PIXELS * COPIES / Tile::THREADS, STRIDE = Tile::THREADS / COPIES;
  unsigned char* shared = shared_memory();
  const int first_pixel = blockIdx.x * Tile::PIXELS, first_channel = blockIdx.y * Tile::CHANNELS;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int warp_m = warp % Tile::ALONG_M, warp_n = warp / Tile::ALONG_M % Tile::ALONG_N;
  const int warp_k = warp / (Tile::ALONG_M * Tile::ALONG_N);
  const int C = sizes.channels, padded = sizes.padded();
  const int parts = divide_up(padded, COPIES * PER_COPY), steps = 9 * parts;

  // This thread copies part `part` of the rows first_row, first_row + STRIDE, ...
  const int part = threadIdx.x % COPIES, first_row = threadIdx.x / COPIES;
  int row[SHARE], column[SHARE];
#pragma unroll
  for (int i = 0; i < SHARE; ++i) {
    const int pixel = first_pixel + first_row + i * STRIDE;
    const Place place(pixel, sizes);
    row[i] = pixel < sizes.pixels ? place.row : -sizes.height - 2;  // outside of the image whatever the tap
    column[i] = place.column;
  }
  const auto fetch = [&](int step) {
    const Swizzled<Tile::ROW> a{shared + step % Tile::STAGES * Tile::STAGE};
    const Swizzled<Tile::ROW> b{a.rows + Tile::PIXELS * Tile::ROW};
    const int tap = step / parts, input = (step % parts * COPIES + part) * PER_COPY;
    const int down = (tap / 3 - 1) * 2, right = (tap % 3 - 1) * 2;
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      const int r = first_row + i * STRIDE;
      const bool inside = row[i] + down >= 0 && row[i] + down < sizes.height && column[i] + right >= 0 &&
                          column[i] + right < sizes.width && input < padded;
      const int64_t near = int64_t(down) * sizes.width + first_pixel + r + right;
      copy_async(a.copy(r, part), inside ? t + near * padded + input : t, inside);
    }
    for (int r = first_row; r < Tile::CHANNELS; r += STRIDE) {
      const int channel = first_channel + r;
      const bool inside = channel < C && input < C;
      const T* from = inside ? weight + (int64_t(tap) * C + channel) * C + input : weight;
      if (aligned) {
        copy_async(b.copy(r, part), from, inside);
      } else {
        auto to = reinterpret_cast<T*>(b.copy(r, part));
        for (int i = 0; i < PER_COPY; ++i) to[i] = inside && input + i < C ? from[i] : narrow<T>(0);
      }
    }
  };

  float sums[MT][NT][4] = {};
#pragma unroll
  for (int step = 0; step < Tile::STAGES - 1; ++step) {
    if (step < steps) fetch(step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<Tile::STAGES - 2>();
    __syncthreads();  // this step's rows have arrived, and all are done with the last step's, which the next fetch
                      // replaces
    if (step + Tile::STAGES - 1 < steps) fetch(step + Tile::STAGES - 1);
    commit_copies();
    const Swizzled<Tile::ROW> a{shared + step % Tile::STAGES * Tile::STAGE + warp_m * 16 * MT * Tile::ROW};
    const Swizzled<Tile::ROW> b{shared + step % Tile::STAGES * Tile::STAGE +
                                (Tile::PIXELS + warp_n * 8 * NT) * Tile::ROW};
#pragma unroll
    for (int slab = warp_k; slab < COPIES / 2; slab += Tile::ALONG_K) multiply<T, TENSOR>(sums, a, b, slab, lane);
  }
  __syncthreads();  // all copies were waited for: the last groups are empty

  auto others = reinterpret_cast<float*>(shared);  // sums of the warps that had other inputs
  float* of_rows = others + (Tile::ALONG_K - 1) * Tile::PIXELS * Tile::CHANNELS;
  if constexpr (Tile::ALONG_K > 1) {
    static_assert(Tile::ALONG_M == 1 && Tile::ALONG_N == 1);
    if (warp_k > 0)
      for (int m = 0; m < MT; ++m)
        for (int n = 0; n < NT; ++n)
          for (int i = 0; i < 4; ++i)
            others[(((warp_k - 1) * MT + m) * NT + n) * 4 * WARP + i * WARP + lane] = sums[m][n][i];
    __syncthreads();
    if (warp_k == 0)
      for (int other = 0; other < Tile::ALONG_K - 1; ++other)
        for (int m = 0; m < MT; ++m)
          for (int n = 0; n < NT; ++n)
            for (int i = 0; i < 4; ++i)
              sums[m][n][i] += others[((other * MT + m) * NT + n) * 4 * WARP + i * WARP + lane];
  }
  if (warp_k == 0) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // the lane's rows g and g + 8
        float sum = 0;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int channel = first_channel + (warp_n * NT + n) * 8 + column_of(j, lane);
            if (channel < C) sum = fmaf(relu(sums[m][n][2 * half + j] + widen(bias[channel])), widen(u[channel]), sum);
          }
        }
        sum = sum_of_row(sum);
        if (lane % 4 == 0) of_rows[warp_n * Tile::PIXELS + (warp_m * MT + m) * 16 + row_of(2 * half, lane)] = sum;
      }
    }
  }
  __syncthreads();
  for (int p = threadIdx.x; p < Tile::PIXELS && first_pixel + p < sizes.pixels; p += Tile::THREADS) {
    float sum = 0;
    for (int i = 0; i < Tile::ALONG_N; ++i) sum += of_rows[i * Tile::PIXELS + p];
    partial[int64_t(blockIdx.y) * sizes.pixels + first_pixel + p] = sum;
  }
}

constexpr int GATE_TILES = 3;  // of 8 channels: a warp's share, of both products
constexpr int GATE_WARPS = MASAG_MOST_CHANNELS / (8 * GATE_TILES);

// Words from one pixel's row of `gate_kernel` to the next, see `Spaced`.
__host__ __device__ constexpr int pitch_of(int slabs) { return slabs * SLAB + 4; }

// Of `gate_kernel`, for 16 MT pixels.
struct GateShape {
  int slabs, pitch, warps;
  size_t shared;
  GateShape(int channels, int per_word, int mt)
      : slabs(divide_up(channels, SLAB * per_word)),
        pitch(pitch_of(slabs)),
        warps(divide_up(channels, 8 * GATE_TILES)),
        shared(size_t(16 * mt) * (pitch + 1 + warps) * 4) {}
};

// Grid: tiles of 16 MT pixels; threads: warps of 24 channels each. WHOLE: channels fill the warps and the slabs, and
// the matrices begin at multiples of 16 bytes. Without `norm_weight` it writes the gate, (B, C, H, W), else (B, H, W,
// C).
template <typename T, bool TENSOR, int MT, bool WHOLE>
__global__ void __launch_bounds__(GATE_WARPS* WARP, 1)
    gate_kernel(Map<T> x, Map<T> g, const float* partial, int tiles, const float* context, const T* projection,
                const T* projection_bias, const T* output, const T* output_bias, const T* norm_weight,
                const T* norm_bias, T* out, Sizes sizes, int slabs, bool across) {
  constexpr int PIXELS = 16 * MT, NT = GATE_TILES;
  const int C = sizes.channels, threads = blockDim.x, warps = threads / WARP;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int first_pixel = blockIdx.x * PIXELS, first_channel = warp * 8 * NT;
  const Spaced between{reinterpret_cast<uint32_t*>(shared_memory()), pitch_of(slabs)};  // first m, then w x
  auto selected = reinterpret_cast<float*>(between.rows + PIXELS * between.pitch);
  float* of_rows = selected + PIXELS;  // (warps, PIXELS)
  const auto element = [&](int p, int c) -> T& { return reinterpret_cast<T*>(between.rows + p * between.pitch)[c]; };

  for (int p = threadIdx.x; p < PIXELS; p += threads) {
    float z = 0;
    if (first_pixel + p < sizes.pixels) {
      z = context[first_pixel + p];
      for (int i = 0; i < tiles; ++i) z += partial[int64_t(i) * sizes.pixels + first_pixel + p];
    }
    selected[p] = sigmoid(z);
  }
  __syncthreads();
  const int inputs = slabs * SLAB * PER_WORD<T>;
  for (int i = threadIdx.x; i < PIXELS * inputs; i += threads) {
    const int p = across ? i / inputs : i % PIXELS, c = across ? i % inputs : i / PIXELS;
    float m = 0;
    if (first_pixel + p < sizes.pixels && c < C) {
      const Place place(first_pixel + p, sizes);
      const float s = selected[p];
      m = silu(widen(x.at(place)[c * x.c]) * (1 + s)) * silu(widen(g.at(place)[c * g.c]) * (2 - s));
    }
    element(p, c) = narrow<T>(m);
  }
  __syncthreads();

  // Calls with a sum of this lane, its pixel in the tile, and its channel; only for those that exist.
  float sums[MT][NT][4] = {};
  const auto each = [&](auto&& act) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int p = 16 * m + row_of(i, lane);
        if (first_pixel + p >= sizes.pixels) continue;
        const Place place(first_pixel + p, sizes);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int c = first_channel + 8 * n + column_of(i, lane);
          if (WHOLE || c < C) act(sums[m][n][i], p, place, c);
        }
      }
    }
  };
  const auto product = [&](const T* matrix) {
    const Matrix<T, WHOLE> b{matrix, C, first_channel};
#pragma unroll(TENSOR ? 2 : 1)
    for (int slab = 0; slab < slabs; ++slab) multiply<T, TENSOR>(sums, between, b, slab, lane);
  };

  product(projection);
  __syncthreads();  // all have read m
  each([&](float& sum, int p, const Place& place, int c) {
    element(p, c) = narrow<T>(sigmoid(sum + widen(projection_bias[c])) * widen(x.at(place)[c * x.c]));
  });
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
  __syncthreads();
  product(output);

  if (norm_weight == nullptr) {
    each([&](float& sum, int, const Place& place, int c) {
      const int64_t row = (int64_t(place.image) * C + c) * sizes.height + place.row;
      out[row * sizes.width + place.column] = narrow<T>(sum + widen(output_bias[c]));
    });
    return;
  }
  each([&](float& sum, int, const Place& place, int c) { sum += widen(output_bias[c]) + widen(g.at(place)[c * g.c]); });
  // The mean over all channels of `term` of each sum, for the lane's rows.
  const auto mean = [&](float(&means)[MT][2], auto&& term) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = 0;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const bool exists = WHOLE || first_channel + 8 * n + column_of(j, lane) < C;
            total += exists ? term(sums[m][n][2 * half + j], m, half) : 0;
          }
        }
        total = sum_of_row(total);
        if (lane % 4 == 0) of_rows[warp * PIXELS + 16 * m + row_of(2 * half, lane)] = total;
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        means[m][half] = 0;
        for (int i = 0; i < warps; ++i) means[m][half] += of_rows[i * PIXELS + 16 * m + row_of(2 * half, lane)];
        means[m][half] /= C;
      }
    }
    __syncthreads();
  };
  float centre[MT][2], variance[MT][2];
  mean(centre, [](float sum, int, int) { return sum; });
  mean(variance, [&](float sum, int m, int half) { return (sum - centre[m][half]) * (sum - centre[m][half]); });
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t pixel = first_pixel + 16 * m + row_of(i, lane);
      if (pixel >= sizes.pixels) continue;
      const float scale = rsqrtf(variance[m][i / 2] + EPSILON);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int c = first_channel + 8 * n + column_of(i, lane);
        if (WHOLE || c < C)
          out[pixel * C + c] =
              narrow<T>((sums[m][n][i] - centre[m][i / 2]) * scale * widen(norm_weight[c]) + widen(norm_bias[c]));
      }
    }
  }
}

// Launchers ----------------------------------------------------------------------------------------------------------

thread_local char last_error[256] = "";

masag_status fail(masag_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

// What all launches of a gate have in common.
struct Call {
  const masag_problem& problem;
  const masag_map& x;
  const masag_map& g;
  const masag_weights& weights;
  void* out;
  void* t;
  float* context;
  float* partial;
  Sizes sizes;
  int processors;
  cudaStream_t stream;
};

// The status of a CUDA call that failed. Clears it, so that the caller's next check does not find ours.
masag_status fail(cudaError_t error, const char* where) {
  cudaGetLastError();
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInsufficientDriver:
      return fail(MASAG_UNSUPPORTED, "%s: this library was not built for the GPU, or its driver is too old: %s", where,
                  cudaGetErrorString(error));
    default:
      return fail(MASAG_CUDA_ERROR, "%s: %s", where, cudaGetErrorString(error));
  }
}

size_t aligned_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

size_t bytes_of(int32_t dtype) { return dtype == MASAG_FLOAT32 ? 4 : 2; }

size_t bytes_of_t(const Sizes& sizes, int32_t dtype) { return size_t(sizes.pixels) * sizes.padded() * bytes_of(dtype); }

size_t bytes_of_context(const Sizes& sizes) { return aligned_up(size_t(sizes.pixels) * sizeof(float)); }

bool is_aligned(const void* pointer, size_t to) { return reinterpret_cast<uintptr_t>(pointer) % to == 0; }

// Whether a program of this many pixels, and channels if they are shared out, leaves no multiprocessor without one.
bool fills(const Call& call, int pixels, int channels) {
  return divide_up(call.sizes.pixels, pixels) * int64_t(divide_up(call.sizes.channels, channels)) >= call.processors;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, const Call& call,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = call.stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <typename T>
const T* of(const void* pointer) {
  return static_cast<const T*>(pointer);
}

template <typename T, bool TENSOR, typename Tile>
cudaError_t launch_dilated(const Call& call, int* tiles) {
  *tiles = divide_up(call.sizes.channels, Tile::CHANNELS);
  const bool aligned = call.sizes.channels * sizeof(T) % 16 == 0 && is_aligned(call.weights.dilated, 16);
  return launch(dilated_kernel<T, TENSOR, Tile>, dim3(divide_up(call.sizes.pixels, Tile::PIXELS), *tiles),
                Tile::THREADS, size_t(Tile::STAGE) * Tile::STAGES, call, of<T>(call.t), of<T>(call.weights.dilated),
                of<T>(call.weights.dilated_bias), of<T>(call.weights.u), call.partial, call.sizes, aligned);
}

template <typename T, bool TENSOR, int MT>
cudaError_t launch_gate(const Call& call, int tiles) {
  const masag_weights& w = call.weights;
  const GateShape shape(call.sizes.channels, PER_WORD<T>, MT);
  const bool whole = call.sizes.channels % (SLAB * PER_WORD<T>) == 0 && call.sizes.channels % (8 * GATE_TILES) == 0 &&
                     is_aligned(w.projection, 16) && is_aligned(w.output, 16);
  return launch(whole ? gate_kernel<T, TENSOR, MT, true> : gate_kernel<T, TENSOR, MT, false>,
                dim3(divide_up(call.sizes.pixels, 16 * MT)), shape.warps * WARP, shape.shared, call, Map<T>(call.x),
                Map<T>(call.g), call.partial, tiles, call.context, of<T>(w.projection), of<T>(w.projection_bias),
                of<T>(w.output), of<T>(w.output_bias), of<T>(w.norm_weight), of<T>(w.norm_bias),
                static_cast<T*>(call.out), call.sizes, shape.slabs, call.x.strides[1] == 1);
}

template <typename T, bool TENSOR>
cudaError_t launch_all(const Call& call) {
  const masag_weights& w = call.weights;
  const dim3 grid(divide_up(call.sizes.pixels, CONTEXT_TILE), divide_up(call.sizes.padded(), CONTEXT_TILE) + 1);
  cudaError_t error =
      launch(context_kernel<T>, grid, CONTEXT_THREADS, CONTEXT_SHARED, call, Map<T>(call.x), Map<T>(call.g),
             of<T>(w.depthwise), of<T>(w.depthwise_bias), of<T>(w.context), static_cast<T*>(call.t), call.context,
             call.sizes, call.x.strides[1] == 1, call.g.strides[1] == 1);
  if (error != cudaSuccess) return error;
  int tiles;
  if (fills(call, Large::PIXELS, Large::CHANNELS))
    error = launch_dilated<T, TENSOR, Large>(call, &tiles);
  else if (fills(call, Medium::PIXELS, Medium::CHANNELS))
    error = launch_dilated<T, TENSOR, Medium>(call, &tiles);
  else if (fills(call, Small::PIXELS, Small::CHANNELS))
    error = launch_dilated<T, TENSOR, Small>(call, &tiles);
  else
    error = launch_dilated<T, TENSOR, Tiny>(call, &tiles);
  if (error != cudaSuccess) return error;
  const auto fitting = [&](int mt) {
    return fills(call, 16 * mt, call.sizes.channels) &&
           GateShape(call.sizes.channels, PER_WORD<T>, mt).shared <= SHARED_LIMIT;
  };
  if constexpr (TENSOR)  // without tensor cores the products need more registers
    if (fitting(4)) return launch_gate<T, TENSOR, 4>(call, tiles);
  if (fitting(2)) return launch_gate<T, TENSOR, 2>(call, tiles);
  return launch_gate<T, TENSOR, 1>(call, tiles);
}

// Checks -------------------------------------------------------------------------------------------------------------

masag_status check_problem(const masag_problem* problem, Sizes* sizes) {
  if (problem == nullptr) return fail(MASAG_INVALID_ARGUMENT, "problem: got a null pointer");
  const int64_t values[] = {problem->batch, problem->channels, problem->height, problem->width};
  const char* const names[] = {"batch", "channels", "height", "width"};
  const int64_t most[] = {MASAG_MOST_PIXELS, MASAG_MOST_CHANNELS, MASAG_MOST_PIXELS, MASAG_MOST_PIXELS};
  for (int i = 0; i < 4; ++i) {
    const auto got = static_cast<long long>(values[i]);
    if (got < 1) return fail(MASAG_INVALID_ARGUMENT, "%s: got %lld, expected at least 1", names[i], got);
    if (got > most[i])
      return fail(MASAG_UNSUPPORTED, "%s: got %lld, this library takes at most %lld", names[i], got,
                  (long long)most[i]);
  }
  if (problem->batch > MASAG_MOST_PIXELS / problem->height ||
      problem->batch * problem->height > MASAG_MOST_PIXELS / problem->width)
    return fail(MASAG_UNSUPPORTED,
                "batch x height x width: got %lld x %lld x %lld, this library takes at most %d pixels",
                (long long)problem->batch, (long long)problem->height, (long long)problem->width, MASAG_MOST_PIXELS);
  if (problem->dtype < MASAG_FLOAT32 || problem->dtype > MASAG_BFLOAT16)
    return fail(MASAG_INVALID_ARGUMENT, "dtype: got %d, expected MASAG_FLOAT32, MASAG_FLOAT16 or MASAG_BFLOAT16",
                int(problem->dtype));
  *sizes = {int(problem->batch * problem->height * problem->width), int(problem->channels), int(problem->height),
            int(problem->width)};
  return MASAG_OK;
}

size_t workspace_bytes_of(const Sizes& sizes, int32_t dtype) {
  return bytes_of_t(sizes, dtype) + bytes_of_context(sizes) * (1 + divide_up(sizes.channels, LEAST_CHANNELS));
}

// Whether the current device's kernels may use the memory: an error here would otherwise end the whole process's
// context.
masag_status check_pointer(const char* name, const void* pointer, size_t alignment, int device) {
  if (pointer == nullptr) return fail(MASAG_INVALID_ARGUMENT, "%s: got a null pointer", name);
  if (!is_aligned(pointer, alignment))
    return fail(MASAG_INVALID_ARGUMENT, "%s: got the address %p, expected a multiple of %d", name, pointer,
                int(alignment));
  cudaPointerAttributes attributes{};
  if (const cudaError_t error = cudaPointerGetAttributes(&attributes, pointer); error != cudaSuccess)
    return fail(error, name);
  if (attributes.type == cudaMemoryTypeUnregistered)
    return fail(MASAG_INVALID_ARGUMENT, "%s: got pageable memory of the host, expected memory of device %d", name,
                device);
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != device)
    return fail(MASAG_INVALID_ARGUMENT, "%s: got memory of device %d, expected device %d, the current one", name,
                attributes.device, device);
  if (attributes.devicePointer != pointer)
    return fail(MASAG_INVALID_ARGUMENT, "%s: got the address %p, expected %p, by which device %d knows that memory",
                name, pointer, attributes.devicePointer, device);
  return MASAG_OK;
}

// The bytes that a map spans.
size_t span(const masag_map& map, const masag_problem& problem) {
  const int64_t sizes[] = {problem.batch, problem.channels, problem.height, problem.width};
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) last += (sizes[i] - 1) * map.strides[i];
  return size_t(last + 1) * bytes_of(problem.dtype);
}

struct Region {
  const char* name;
  const void* start;
  size_t bytes;
};

masag_status check_apart(const Region& written, const Region& other) {
  const auto a = reinterpret_cast<uintptr_t>(written.start), b = reinterpret_cast<uintptr_t>(other.start);
  if (a < b + other.bytes && b < a + written.bytes)
    return fail(MASAG_INVALID_ARGUMENT, "%s: overlaps %s, expected memory of its own", written.name, other.name);
  return MASAG_OK;
}

masag_status check_device(int* device, int* processors) {
  int major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, *device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, *device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, *device);
  if (error != cudaSuccess) return fail(error, "the current device");
  if (major < 8)
    return fail(MASAG_UNSUPPORTED, "device %d has compute capability %d.%d, expected 8.0 or newer", *device, major,
                minor);
  return MASAG_OK;
}

masag_status check_map(const char* name, const masag_map* map, const masag_problem& problem, int device) {
  if (map == nullptr) return fail(MASAG_INVALID_ARGUMENT, "%s: got a null pointer", name);
  const int64_t sizes[] = {problem.batch, problem.channels, problem.height, problem.width};
  const int64_t most = int64_t(1) << 40;  // elements, so that no offset comes near 64 bits
  for (int i = 0; i < 4; ++i)
    if (map->strides[i] < 0 || map->strides[i] > most / sizes[i])
      return fail(MASAG_INVALID_ARGUMENT, "%s: got the stride %lld of an axis of %lld, expected 0 to %lld", name,
                  (long long)map->strides[i], (long long)sizes[i], (long long)(most / sizes[i]));
  return check_pointer(name, map->data, bytes_of(problem.dtype), device);
}

// Fills `regions` with the weights that are given; `count` are.
masag_status check_weights(const masag_weights* weights, const masag_problem& problem, int device,
                           Region (&regions)[12], int* count) {
  if (weights == nullptr) return fail(MASAG_INVALID_ARGUMENT, "weights: got a null pointer");
  const masag_weights& w = *weights;
  if ((w.norm_weight == nullptr) != (w.norm_bias == nullptr))
    return fail(MASAG_INVALID_ARGUMENT, "norm_weight, norm_bias: got one of them, expected both or neither");
  const size_t element = bytes_of(problem.dtype), c = problem.channels * element;
  const size_t square = c * problem.channels;
  const Region all[] = {{"depthwise", w.depthwise, 9 * c},
                        {"depthwise_bias", w.depthwise_bias, c},
                        {"dilated", w.dilated, 9 * square},
                        {"dilated_bias", w.dilated_bias, c},
                        {"u", w.u, c},
                        {"context", w.context, 3 * element},
                        {"projection", w.projection, square},
                        {"projection_bias", w.projection_bias, c},
                        {"output", w.output, square},
                        {"output_bias", w.output_bias, c},
                        {"norm_weight", w.norm_weight, c},
                        {"norm_bias", w.norm_bias, c}};
  *count = w.norm_weight == nullptr ? 10 : 12;
  for (int i = 0; i < *count; ++i) {
    if (const masag_status status = check_pointer(all[i].name, all[i].start, element, device)) return status;
    regions[i] = all[i];
  }
  return MASAG_OK;
}

}  // namespace

// C API --------------------------------------------------------------------------------------------------------------

extern "C" {

#ifndef MASAG_SOURCES
#define MASAG_SOURCES ""
#endif
const char* masag_sources(void) { return MASAG_SOURCES; }

const char* masag_last_error(void) { return last_error; }

masag_status masag_check_device(void) {
  int device = 0, processors = 0;
  if (const masag_status status = check_device(&device, &processors)) return status;
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, context_kernel<float>);
  return error == cudaSuccess ? MASAG_OK : fail(error, "the current device");
}

masag_status masag_workspace_size(const masag_problem* problem, size_t* bytes) {
  Sizes sizes;
  if (const masag_status status = check_problem(problem, &sizes)) return status;
  if (bytes == nullptr) return fail(MASAG_INVALID_ARGUMENT, "bytes: got a null pointer");
  *bytes = workspace_bytes_of(sizes, problem->dtype);
  return MASAG_OK;
}

masag_status masag_forward(const masag_problem* problem, const masag_map* x, const masag_map* g,
                           const masag_weights* weights, void* out, void* workspace, size_t workspace_bytes,
                           cudaStream_t stream) {
  Sizes sizes;
  int device = 0, processors = 0;
  if (const masag_status status = check_problem(problem, &sizes)) return status;
  if (const masag_status status = check_device(&device, &processors)) return status;
  if (const masag_status status = check_map("x", x, *problem, device)) return status;
  if (const masag_status status = check_map("g", g, *problem, device)) return status;
  Region read[12];
  int count = 0;
  if (const masag_status status = check_weights(weights, *problem, device, read, &count)) return status;
  if (const masag_status status = check_pointer("out", out, bytes_of(problem->dtype), device)) return status;
  if (const masag_status status = check_pointer("workspace", workspace, 16, device)) return status;
  const size_t needed = workspace_bytes_of(sizes, problem->dtype);
  if (workspace_bytes < needed)
    return fail(MASAG_INVALID_ARGUMENT, "workspace_bytes: got %zu, expected at least %zu", workspace_bytes, needed);
  const Region written[] = {{"out", out, size_t(sizes.pixels) * sizes.channels * bytes_of(problem->dtype)},
                            {"workspace", workspace, needed}};
  if (const masag_status status = check_apart(written[0], written[1])) return status;
  for (const Region& each : written) {
    if (const masag_status status = check_apart(each, {"x", x->data, span(*x, *problem)})) return status;
    if (const masag_status status = check_apart(each, {"g", g->data, span(*g, *problem)})) return status;
    for (int i = 0; i < count; ++i)
      if (const masag_status status = check_apart(each, read[i])) return status;
  }

  auto bytes = static_cast<unsigned char*>(workspace);
  auto context = reinterpret_cast<float*>(bytes + bytes_of_t(sizes, problem->dtype));
  auto partial = context + bytes_of_context(sizes) / sizeof(float);
  const Call call{*problem, *x, *g, *weights, out, workspace, context, partial, sizes, processors, stream};
  cudaError_t error;
  if (problem->dtype == MASAG_FLOAT16)
    error = launch_all<__half, true>(call);
  else if (problem->dtype == MASAG_BFLOAT16)
    error = launch_all<__nv_bfloat16, true>(call);
  else
    error = problem->tf32 ? launch_all<float, true>(call) : launch_all<float, false>(call);
  return error == cudaSuccess ? MASAG_OK : fail(error, "launch");
}

}  // extern "C"
