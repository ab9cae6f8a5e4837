// Matrices of a few rows, held in a core's registers and first caches; vectors are the compiler's.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>

namespace {

// Floats a vector, vectors a tile is wide, and accumulators a tile may hold: what the registers take.
#if defined(__AVX512F__)
constexpr int LANES = 16, WIDEST = 4, ACCUMULATORS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDEST = 2, ACCUMULATORS = 8;
#else
constexpr int LANES = 4, WIDEST = 4, ACCUMULATORS = 16;
#endif

constexpr int BLOCK = 64;  // queries, and keys, of one block of scores
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));  // anywhere

inline Vec load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vec v) { *reinterpret_cast<Loose*>(to) = v; }
inline Vec all(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Lane i and lane i ^ STEP change places.
template <int STEP, int... I>
inline Vec swapped(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ STEP)...);
}

template <typename Join, int STEP = LANES / 2>
inline float reduce(Vec v, Join join) {
  v = join(v, swapped<STEP>(v, std::make_integer_sequence<int, LANES>{}));
  if constexpr (STEP > 1)
    return reduce<Join, STEP / 2>(v, join);
  else
    return v[0];
}

inline float sum(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}
inline float top(Vec v) { return reduce(v, larger); }

// e^x to 2e-7 of it for x up to some 80, and 0 below -87 (Cody and Waite's reduction; the polynomial
// is that of Moshier's Cephes library).
inline Vec exponential(Vec x) {
  const Vec magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Vec power = (Vec)(((Ints)shifted - (Ints)magic + 127) << 23);
  return x < all(-87.f) ? Vec{} : p * power;
}

struct Left {  // element (i, k) lies at data[i * row + k * column]
  const float* data;
  int64_t row, column;
};

// One tile of C = A B, or C += A B: R rows, W vectors wide. Never part of its caller, whose other
// values would leave it too few registers.
template <int R, int W>
__attribute__((noinline)) void tile(bool add, int64_t depth, Left a, const float* b, int64_t b_row,
                                    float* c, int64_t c_row) {
  Vec sums[R][W];
  for (int i = 0; i < R; ++i)
    for (int w = 0; w < W; ++w) sums[i][w] = add ? load(c + i * c_row + w * LANES) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[W];
    for (int w = 0; w < W; ++w) {
      right[w] = load(b + k * b_row + w * LANES);
#if defined(__x86_64__)
      asm("" : "+v"(right[w]));  // in a register: GCC would load it again for every row
#endif
    }
    for (int i = 0; i < R; ++i) {
      const Vec left = all(a.data[i * a.row + k * a.column]);
      for (int w = 0; w < W; ++w) sums[i][w] += left * right[w];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int w = 0; w < W; ++w) store(c + i * c_row + w * LANES, sums[i][w]);
}

// A strip of C, W vectors wide: R rows at a time, then what is left in halves of R.
template <int R, int W>
void strip(bool add, int64_t rows, int64_t depth, Left a, const float* b, int64_t b_row, float* c,
           int64_t c_row) {
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    tile<R, W>(add, depth, {a.data + i * a.row, a.row, a.column}, b, b_row, c + i * c_row, c_row);
  if constexpr (R > 1)
    if (i < rows)
      strip<R / 2, W>(add, rows - i, depth, {a.data + i * a.row, a.row, a.column}, b, b_row,
                      c + i * c_row, c_row);
}

// C[rows, cols] = (add ? C : 0) + A[rows, depth] B[depth, cols]; cols is a multiple of LANES.
void matmul(bool add, int64_t rows, int64_t depth, int64_t cols, Left a, const float* b,
            int64_t b_row, float* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + WIDEST * LANES <= cols; j += WIDEST * LANES)
    strip<ACCUMULATORS / WIDEST, WIDEST>(add, rows, depth, a, b + j, b_row, c + j, c_row);
  if constexpr (WIDEST > 2)
    for (; j + 2 * LANES <= cols; j += 2 * LANES)
      strip<ACCUMULATORS / 2, 2>(add, rows, depth, a, b + j, b_row, c + j, c_row);
  for (; j < cols; j += LANES)
    strip<ACCUMULATORS / 2, 1>(add, rows, depth, a, b + j, b_row, c + j, c_row);
}

template <int FROM, int... I>  // lanes FROM, FROM + 1, .. of a and of b in turns
inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * LANES)...);
}

// Transposes LANES vectors of LANES: a perfect shuffle log2(LANES) times.
template <int STAGE = 1>
inline void transpose_square(Vec (&rows)[LANES]) {
  if constexpr (STAGE < LANES) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
    Vec next[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + LANES / 2], lanes);
      next[2 * i + 1] = interleave<LANES / 2>(rows[i], rows[i + LANES / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
    transpose_square<STAGE * 2>(rows);
  }
}

// The sums of the lanes of each of N vectors: halved, pair after pair, until one vector holds all.
template <int N = LANES>
inline Vec lane_sums(Vec (&rows)[LANES]) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 8
  for (int i = 0; i < N / 2; ++i)
    rows[i] = interleave<0>(rows[i], rows[i + N / 2], lanes) +
              interleave<LANES / 2>(rows[i], rows[i + N / 2], lanes);
  if constexpr (N > 2)
    return lane_sums<N / 2>(rows);
  else
    return rows[0];
}

// Memory that will be read soon, asked for a few lines at a time, into the second cache: the first has
// too few slots for lines on their way, and what was asked for would hold up what is needed now.
struct Ahead {
  const uint8_t* from = nullptr;
  int64_t bytes = 0;
  void fetch(int64_t lines) {
    for (; lines > 0 && bytes > 0; --lines, from += 64, bytes -= 64) __builtin_prefetch(from, 0, 2);
  }
};

// out[s] = (add ? out[s] : 0) + <row, in[s]> for BLOCK rows s of `dims`, a multiple of LANES: a matmul
// for one row, without the transpose. Fetches what is ahead.
void dot_rows(bool add, const float* row, const float* in, int64_t dims, float* out, Ahead* keys,
              Ahead* values) {
  for (int64_t s = 0; s < BLOCK; s += LANES) {
    Vec products[LANES] = {};
    for (int64_t d = 0; d < dims; d += LANES) {
      const Vec left = load(row + d);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        keys->fetch(1), values->fetch(1);
        products[i] += left * load(in + (s + i) * dims + d);
      }
    }
    store(out + s, lane_sums(products) + (add ? load(out + s) : Vec{}));
  }
}

// out[d, s] = in[s, d] for BLOCK rows s and `dims` columns d, a multiple of LANES; fetches what is ahead.
void transpose(const float* in, int64_t in_row, int64_t dims, float* out, Ahead* keys = nullptr,
               Ahead* values = nullptr) {
  for (int64_t s = 0; s < BLOCK; s += LANES)
    for (int64_t d = 0; d < dims; d += LANES) {
      if (keys) keys->fetch(LANES), values->fetch(LANES);
      Vec rows[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) rows[i] = load(in + (s + i) * in_row + d);
      transpose_square(rows);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(out + (d + i) * BLOCK + s, rows[i]);
    }
}

}  // namespace
