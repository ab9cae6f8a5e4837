// Matrices of a few rows, held in a core's registers and first caches; vectors are the compiler's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
// LANES elements of a bfloat16 cache (its bits) or of an int8 cache, as floats. GCC 12 takes up to ten
// instructions for __builtin_convertvector where the processor has two.
#if defined(__AVX512F__)
inline Vec load(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
inline Vec load(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
#elif defined(__AVX2__)
inline Vec load(const uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
inline Vec load(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
#else
inline Vec load(const uint16_t* from) {
  uint16_t __attribute__((vector_size(LANES * 2))) bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Vec)(__builtin_convertvector(bits, Ints) << 16);
}
inline Vec load(const int8_t* from) {
  int8_t __attribute__((vector_size(LANES))) bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Vec);
}
#endif
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
template <int R, int W, typename Element>
__attribute__((noinline)) void tile(bool add, int64_t depth, Left a, const Element* b, int64_t b_row,
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
template <int R, int W, typename Element>
void strip(bool add, int64_t rows, int64_t depth, Left a, const Element* b, int64_t b_row, float* c,
           int64_t c_row) {
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    tile<R, W>(add, depth, {a.data + i * a.row, a.row, a.column}, b, b_row, c + i * c_row, c_row);
  if constexpr (R > 1)
    if (i < rows)
      strip<R / 2, W>(add, rows - i, depth, {a.data + i * a.row, a.row, a.column}, b, b_row,
                      c + i * c_row, c_row);
}

// C[rows, cols] = (add ? C : 0) + A[rows, depth] B[depth, cols]; cols is a multiple of LANES. MOST:
// the most rows there will be, so that no more is compiled.
template <int64_t MOST = ACCUMULATORS, typename Element>
void matmul(bool add, int64_t rows, int64_t depth, int64_t cols, Left a, const Element* b,
            int64_t b_row, float* c, int64_t c_row) {
  constexpr int widest = std::min<int>(MOST, ACCUMULATORS / WIDEST);
  constexpr int rest = std::min<int>(MOST, ACCUMULATORS / 2);
  int64_t j = 0;
  for (; j + WIDEST * LANES <= cols; j += WIDEST * LANES)
    strip<widest, WIDEST>(add, rows, depth, a, b + j, b_row, c + j, c_row);
  if constexpr (WIDEST > 2)
    for (; j + 2 * LANES <= cols; j += 2 * LANES)
      strip<rest, 2>(add, rows, depth, a, b + j, b_row, c + j, c_row);
  for (; j < cols; j += LANES)
    strip<rest, 1>(add, rows, depth, a, b + j, b_row, c + j, c_row);
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

template <typename Element>
struct Pair {  // rows of queries, and of slots, of `dims` elements, a multiple of LANES
  const float* queries;
  const Element* slots;
  int64_t dims;
};

// out[q, s] = the sum over the pairs of <queries[q], slots[s]>, for Q queries and `count` slots: a matmul
// for few rows, without a transpose. Slots are read strictly upwards and sums kept apart until a slot is
// done: the processor is then quick to see the stream. The same sums with rows of a column in turns, or
// inlined into a caller, come at two thirds of memory's speed (docs/log.md).
template <int Q, int PAIRS, typename Element>
__attribute__((noinline)) void dot_rows(const Pair<Element> (&pairs)[PAIRS], int64_t count,
                                        float* out, int64_t out_row) {
  constexpr int at_once = LANES / Q;
  int64_t s = 0;
  for (; s + at_once <= count; s += at_once) {
    Vec products[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < at_once; ++i) {
      Vec sums[Q] = {};
      for (const auto [queries, slots, dims] : pairs)
        for (int64_t d = 0; d < dims; d += LANES) {
          const Vec slot = load(slots + (s + i) * dims + d);
          for (int q = 0; q < Q; ++q) sums[q] += load(queries + q * dims + d) * slot;
        }
      for (int q = 0; q < Q; ++q) products[q * at_once + i] = sums[q];
    }
    float scores[LANES];
    store(scores, lane_sums(products));
    for (int q = 0; q < Q; ++q)
      std::memcpy(out + q * out_row + s, scores + q * at_once, at_once * sizeof(float));
  }
  for (; s < count; ++s)
    for (int q = 0; q < Q; ++q) {
      Vec product{};
      for (const auto [queries, slots, dims] : pairs)
        for (int64_t d = 0; d < dims; d += LANES)
          product += load(queries + q * dims + d) * load(slots + s * dims + d);
      out[q * out_row + s] = sum(product);
    }
}

// The same for any number of queries: four at a time, then what is left in halves. Moves the pairs on.
template <int Q = 4, int PAIRS, typename Element>
void dots(int64_t queries, Pair<Element> (&pairs)[PAIRS], int64_t count, float* out,
          int64_t out_row) {
  for (; queries >= Q; queries -= Q, out += Q * out_row) {
    dot_rows<Q>(pairs, count, out, out_row);
    for (auto& pair : pairs) pair.queries += Q * pair.dims;
  }
  if constexpr (Q > 1) dots<Q / 2>(queries, pairs, count, out, out_row);
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
