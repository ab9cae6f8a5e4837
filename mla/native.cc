// Attention on CPU cores: causal, forward and backward, and through a cache.
//
// XLA's CPU backend runs softmax(Q K^T) V as separate programs over small matrices, and converts a
// bfloat16 or int8 cache in memory before it reads it. Here a block of scores never leaves a core's
// first caches, and a cached element is read once, in the dtype in which it lies. native.py builds
// this file, and says what goes in and out; letters are the house's (B T S H K G V; n: a key's dims).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Floats a vector, vectors a tile is wide, and accumulators a tile may hold: what the registers take.
#if defined(__AVX512F__)
constexpr int LANES = 16, WIDEST = 4, ACCUMULATORS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDEST = 2, ACCUMULATORS = 8;
#else
constexpr int LANES = 4, WIDEST = 4, ACCUMULATORS = 16;
#endif

constexpr int BLOCK = 64;            // queries, and keys, of one block of scores
constexpr int STRIP = 16;            // queries that see as many keys, in a block on the diagonal
constexpr int64_t SPLIT = 2048;      // cache slots one task reads
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

// ---- small matrices -----------------------------------------------------------------------------

struct Left {  // element (i, k) lies at data[i * row + k * column]
  const float* data;
  int64_t row, column;
};

// One tile of C = A B, or C += A B: R rows, W vectors wide.
template <int R, int W>
void tile(bool add, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row) {
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

// ---- work in parallel ---------------------------------------------------------------------------

// run(0) .. run(tasks - 1), on this thread and on those of XLA's pool that are free. This thread waits
// for nothing but tasks already begun, so it is safe on a pool whose threads all wait like this.
template <typename Run>
void parallel(ffi::ThreadPool pool, int64_t tasks, const Run& run) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, tasks, &run] {
    for (int64_t task; (task = shared->next++) < tasks; ++shared->done) run(task);
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  while (shared->done < tasks) std::this_thread::yield();
}

// Memory for one task, not zeroed, each piece on a cache line of its own. A thread keeps what it has
// needed: the task after the next asks for the same pieces.
class Scratch {
 public:
  float* take(int64_t floats) {
    if (next_ == kept().size()) kept().emplace_back();
    Piece& piece = kept()[next_++];
    if (piece.floats < floats) {
      const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      piece = {floats, {static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free}};
    }
    return piece.memory.get();
  }

 private:
  struct Piece {
    int64_t floats = 0;
    std::unique_ptr<float, decltype(&std::free)> memory{nullptr, &std::free};
  };
  static std::vector<Piece>& kept() {
    thread_local std::vector<Piece> pieces;
    return pieces;
  }
  size_t next_ = 0;
};

// ---- causal -------------------------------------------------------------------------------------

struct Heads {  // [B, T, heads, dims]
  float* data;
  int64_t T, heads, dims;
  float* at(int64_t b, int64_t t, int64_t h) const {
    return data + ((b * T + t) * heads + h) * dims;
  }
};

Heads heads_of(ffi::AnyBuffer buffer) {
  const auto shape = buffer.dimensions();
  return {reinterpret_cast<float*>(buffer.untyped_data()), shape[1], shape[2], shape[3]};
}

using Parts = std::vector<Heads>;

int64_t dims_of(const Parts& parts) {
  int64_t dims = 0;
  for (const Heads& part : parts) dims += part.dims;
  return dims;
}

// Tokens t .. t + count of one head, its parts side by side, times `scale`: rows of `row` floats, what
// is left of a row and of BLOCK rows zero.
void gather(const Parts& parts, int64_t b, int64_t t, int64_t count, int64_t h, int64_t heads,
            float scale, float* out, int64_t row) {
  if (count < BLOCK || dims_of(parts) < row) std::memset(out, 0, sizeof(float) * row * BLOCK);
  for (int64_t i = 0; i < count; ++i) {
    float* to = out + i * row;
    for (const Heads& part : parts) {  // a part may have fewer heads, each for several
      const float* from = part.at(b, t + i, h * part.heads / heads);
      for (int64_t d = 0; d < part.dims; ++d) to[d] = from[d] * scale;
      to += part.dims;
    }
  }
}

void scatter(const float* in, int64_t row, float scale, const Parts& parts, int64_t b, int64_t t,
             int64_t count, int64_t h) {
  for (int64_t i = 0; i < count; ++i) {
    const float* from = in + i * row;
    for (const Heads& part : parts) {
      float* to = part.at(b, t + i, h);
      for (int64_t d = 0; d < part.dims; ++d) to[d] = from[d] * scale;
      from += part.dims;
    }
  }
}

// The block of scores of queries i and keys j <= i, in strips of rows that see the first `keys` of its
// columns: one strip, or on the diagonal, where later keys are hidden, several.
template <typename Run>  // run(first row, rows, keys)
void visit_strips(bool diagonal, int64_t count, const Run& run) {
  if (!diagonal) return run(0, count, BLOCK);
  for (int64_t row = 0; row < count; row += STRIP)
    run(row, std::min<int64_t>(STRIP, count - row), row + STRIP);
}

inline void hide_later(float* scores, int64_t row, int64_t keys) {  // on the diagonal
  for (int64_t s = row + 1; s < keys; ++s) scores[s] = NONE;
}

// Running softmax of one row: `scores` become weights relative to the largest seen so far.
struct Running {
  float largest = NONE, total = 0;
  float take(float* scores, int64_t cols) {  // returns by what all before shrinks
    Vec tops = all(largest);
    for (int64_t s = 0; s < cols; s += LANES) tops = larger(tops, load(scores + s));
    const float now = top(tops), shrink = largest == now ? 1.f : std::exp(largest - now);
    Vec sums{};
    for (int64_t s = 0; s < cols; s += LANES) {
      const Vec weight = exponential(load(scores + s) - now);
      store(scores + s, weight);
      sums += weight;
    }
    total = total * shrink + sum(sums);
    largest = now;
    return shrink;
  }
};

void shrink_row(float* row, int64_t dims, float by) {
  if (by == 1.f) return;
  for (int64_t d = 0; d < dims; d += LANES) store(row + d, load(row + d) * by);
}

struct Causal {
  Parts queries, keys;
  Heads values;
  float scale;
  int64_t B, T, H, K, n, n_row, v_row, blocks;

  Causal(ffi::RemainingArgs& args, int64_t parts, float scale) : scale(scale) {
    for (int64_t i = 0; i < parts; ++i) queries.push_back(heads_of(*args.get<ffi::AnyBuffer>(i)));
    for (int64_t i = 0; i < parts; ++i)
      keys.push_back(heads_of(*args.get<ffi::AnyBuffer>(parts + i)));
    values = heads_of(*args.get<ffi::AnyBuffer>(2 * parts));
    B = (*args.get<ffi::AnyBuffer>(0)).dimensions()[0];
    T = values.T, H = queries[0].heads, K = values.heads, n = dims_of(queries);
    n_row = padded(n), v_row = padded(values.dims), blocks = (T + BLOCK - 1) / BLOCK;
  }
  int64_t count(int64_t block) const { return std::min<int64_t>(BLOCK, T - block * BLOCK); }
};

void forward_of_head(const Causal& c, int64_t b, int64_t k, Heads out, float* log_sums) {
  Scratch scratch;
  float* columns = scratch.take(c.blocks * c.n_row * BLOCK);  // keys, transposed block by block
  float* values = scratch.take(c.blocks * BLOCK * c.v_row);
  float* rows = scratch.take(BLOCK * std::max(c.n_row, c.v_row));
  float* scores = scratch.take(BLOCK * BLOCK);
  float* mixed = scratch.take(BLOCK * c.v_row);
  for (int64_t j = 0; j < c.blocks; ++j) {
    gather(c.keys, b, j * BLOCK, c.count(j), k, c.K, 1, rows, c.n_row);
    transpose(rows, c.n_row, c.n_row, columns + j * c.n_row * BLOCK);
    gather({c.values}, b, j * BLOCK, c.count(j), k, c.K, 1, values + j * BLOCK * c.v_row, c.v_row);
  }
  const int64_t group = c.H / c.K;
  for (int64_t h = k * group; h < (k + 1) * group; ++h)
    for (int64_t i = 0; i < c.blocks; ++i) {
      const int64_t count = c.count(i);
      Running running[BLOCK];
      gather(c.queries, b, i * BLOCK, count, h, c.H, c.scale, rows, c.n_row);
      std::memset(mixed, 0, sizeof(float) * BLOCK * c.v_row);
      for (int64_t j = 0; j <= i; ++j) {
        visit_strips(j == i, count, [&](int64_t first, int64_t height, int64_t seen) {
          matmul(false, height, c.n, seen, {rows + first * c.n_row, c.n_row, 1},
                 columns + j * c.n_row * BLOCK, BLOCK, scores, BLOCK);
          for (int64_t r = first; r < first + height; ++r) {
            float* row = scores + (r - first) * BLOCK;
            if (j == i) hide_later(row, r, seen);
            shrink_row(mixed + r * c.v_row, c.v_row, running[r].take(row, seen));
          }
          matmul(true, height, seen, c.v_row, {scores, BLOCK, 1}, values + j * BLOCK * c.v_row,
                 c.v_row, mixed + first * c.v_row, c.v_row);
        });
      }
      for (int64_t r = 0; r < count; ++r) {
        scatter(mixed + r * c.v_row, c.v_row, 1 / running[r].total, {out}, b, i * BLOCK + r, 1, h);
        log_sums[(b * c.H + h) * c.T + i * BLOCK + r] =
            running[r].largest + std::log(running[r].total);
      }
    }
}

ffi::Error causal_forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          int64_t parts, float scale) {
  const Causal c(args, parts, scale);
  const Heads out = heads_of(**rets.get<ffi::AnyBuffer>(0));
  float* log_sums = reinterpret_cast<float*>((**rets.get<ffi::AnyBuffer>(1)).untyped_data());
  parallel(pool, c.B * c.K,
           [&](int64_t task) { forward_of_head(c, task / c.K, task % c.K, out, log_sums); });
  return ffi::Error::Success();
}

// Gradients of queries, and of keys and values per key head.
struct Gradients {
  Parts queries, keys;
  Heads values;
};

void backward_of_head(const Causal& c, int64_t b, int64_t k, Heads out, const float* log_sums,
                      Heads d_out, const Gradients& to) {
  Scratch scratch;
  float* keys = scratch.take(c.blocks * BLOCK * c.n_row);
  float* columns = scratch.take(c.blocks * c.n_row * BLOCK);        // keys, transposed
  float* value_columns = scratch.take(c.blocks * c.v_row * BLOCK);  // values, transposed
  float* d_keys = scratch.take(c.blocks * BLOCK * c.n_row);
  float* d_values = scratch.take(c.blocks * BLOCK * c.v_row);
  float* rows = scratch.take(BLOCK * c.n_row);
  float* d_rows = scratch.take(BLOCK * c.v_row);
  float* d_queries = scratch.take(BLOCK * c.n_row);
  float* weights = scratch.take(BLOCK * BLOCK);
  float* d_scores = scratch.take(BLOCK * BLOCK);
  for (int64_t j = 0; j < c.blocks; ++j) {
    float* block = keys + j * BLOCK * c.n_row;
    gather(c.keys, b, j * BLOCK, c.count(j), k, c.K, 1, block, c.n_row);
    transpose(block, c.n_row, c.n_row, columns + j * c.n_row * BLOCK);
    gather({c.values}, b, j * BLOCK, c.count(j), k, c.K, 1, d_rows, c.v_row);
    transpose(d_rows, c.v_row, c.v_row, value_columns + j * c.v_row * BLOCK);
  }
  std::memset(d_keys, 0, sizeof(float) * c.blocks * BLOCK * c.n_row);
  std::memset(d_values, 0, sizeof(float) * c.blocks * BLOCK * c.v_row);
  const int64_t group = c.H / c.K;
  for (int64_t h = k * group; h < (k + 1) * group; ++h)
    for (int64_t i = 0; i < c.blocks; ++i) {
      const int64_t count = c.count(i);
      gather(c.queries, b, i * BLOCK, count, h, c.H, c.scale, rows, c.n_row);
      gather({d_out}, b, i * BLOCK, count, h, c.H, 1, d_rows, c.v_row);
      // d_scores = weights * (d_weights - sum_s weights * d_weights), and that sum is <out, d_out>.
      float means[BLOCK];
      for (int64_t r = 0; r < count; ++r) {
        const float* mixed = out.at(b, i * BLOCK + r, h);
        means[r] = 0;
        for (int64_t d = 0; d < out.dims; ++d) means[r] += mixed[d] * d_rows[r * c.v_row + d];
      }
      std::memset(d_queries, 0, sizeof(float) * BLOCK * c.n_row);
      for (int64_t j = 0; j <= i; ++j) {
        visit_strips(j == i, count, [&](int64_t first, int64_t height, int64_t seen) {
          float* block = weights + first * BLOCK;
          float* d_block = d_scores + first * BLOCK;
          matmul(false, height, c.n, seen, {rows + first * c.n_row, c.n_row, 1},
                 columns + j * c.n_row * BLOCK, BLOCK, block, BLOCK);
          matmul(false, height, c.values.dims, seen, {d_rows + first * c.v_row, c.v_row, 1},
                 value_columns + j * c.v_row * BLOCK, BLOCK, d_block, BLOCK);
          for (int64_t r = first; r < first + height; ++r) {
            float* row = weights + r * BLOCK;
            float* d_row = d_scores + r * BLOCK;
            if (j == i) hide_later(row, r, seen);
            const float log_sum = log_sums[(b * c.H + h) * c.T + i * BLOCK + r];
            for (int64_t s = 0; s < seen; s += LANES) {
              const Vec weight = exponential(load(row + s) - log_sum);
              store(row + s, weight);
              store(d_row + s, weight * (load(d_row + s) - means[r]));
            }
          }
          matmul(true, height, seen, c.n_row, {d_block, BLOCK, 1}, keys + j * BLOCK * c.n_row,
                 c.n_row, d_queries + first * c.n_row, c.n_row);
        });
        // The same strips seen from the keys: those from `first` on are seen by the rows from there on.
        for (int64_t first = 0, height = j == i ? STRIP : BLOCK; first < BLOCK; first += height) {
          const int64_t from = j == i ? first : 0;
          if (from >= count) break;
          const int64_t corner = from * BLOCK + first;
          matmul(true, height, count - from, c.n_row, {d_scores + corner, 1, BLOCK},
                 rows + from * c.n_row, c.n_row, d_keys + (j * BLOCK + first) * c.n_row, c.n_row);
          matmul(true, height, count - from, c.v_row, {weights + corner, 1, BLOCK},
                 d_rows + from * c.v_row, c.v_row, d_values + (j * BLOCK + first) * c.v_row,
                 c.v_row);
        }
      }
      scatter(d_queries, c.n_row, c.scale, to.queries, b, i * BLOCK, count, h);
    }
  scatter(d_keys, c.n_row, 1, to.keys, b, 0, c.T, k);
  scatter(d_values, c.v_row, 1, {to.values}, b, 0, c.T, k);
}

ffi::Error causal_backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           int64_t parts, float scale) {
  const Causal c(args, parts, scale);
  const Heads out = heads_of(*args.get<ffi::AnyBuffer>(2 * parts + 1));
  const float* log_sums =
      reinterpret_cast<float*>((*args.get<ffi::AnyBuffer>(2 * parts + 2)).untyped_data());
  const Heads d_out = heads_of(*args.get<ffi::AnyBuffer>(2 * parts + 3));
  Gradients to;
  for (int64_t i = 0; i < parts; ++i) {
    to.queries.push_back(heads_of(**rets.get<ffi::AnyBuffer>(i)));
    to.keys.push_back(heads_of(**rets.get<ffi::AnyBuffer>(parts + i)));
  }
  to.values = heads_of(**rets.get<ffi::AnyBuffer>(2 * parts));
  parallel(pool, c.B * c.K, [&](int64_t task) {
    backward_of_head(c, task / c.K, task % c.K, out, log_sums, d_out, to);
  });
  return ffi::Error::Success();
}

// ---- through a cache ----------------------------------------------------------------------------

struct Stored {  // values [B K, S, dims] in the cache's dtype, and for int8 scales [B K, S]
  const uint8_t* data;
  const float* scales;
  ffi::DataType dtype;
  int64_t K, S, dims;
};

Stored stored_of(ffi::AnyBuffer values, ffi::AnyBuffer scales, int64_t B) {
  const auto shape = values.dimensions();
  const bool scaled = values.element_type() == ffi::DataType::S8;
  return {reinterpret_cast<const uint8_t*>(values.untyped_data()),
          scaled ? reinterpret_cast<const float*>(scales.untyped_data()) : nullptr,
          values.element_type(), shape[0] / B, shape[1], shape[2]};
}

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(uint16_t x) {  // bfloat16 is the upper half of a float
  const uint32_t bits = uint32_t{x} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <typename Element>
void widen_slots(const Element* __restrict from, int64_t count, int64_t dims, float* __restrict out,
                 int64_t row) {
  if (dims == row) {
    for (int64_t i = 0; i < count * dims; ++i) out[i] = widen(from[i]);
  } else {
    std::memset(out, 0, sizeof(float) * count * row);
    for (int64_t s = 0; s < count; ++s)
      for (int64_t d = 0; d < dims; ++d) out[s * row + d] = widen(from[s * dims + d]);
  }
  std::memset(out + count * row, 0, sizeof(float) * (BLOCK - count) * row);
}

// Slots s .. s + count of one head as BLOCK rows of `row` floats, unscaled: in `buffer`, or where they
// lie if they already are such rows. `ahead` becomes the block after it.
const float* read_slots(const Stored& stored, int64_t b, int64_t k, int64_t s, int64_t count,
                        float* buffer, int64_t row, Ahead* ahead) {
  const int64_t first = ((b * stored.K + k) * stored.S + s) * stored.dims;
  const int64_t size = stored.dtype == ffi::DataType::F32    ? 4
                       : stored.dtype == ffi::DataType::BF16 ? 2
                                                             : 1;
  const uint8_t* from = stored.data + first * size;
  const int64_t bytes = BLOCK * stored.dims * size;
  *ahead = {from + bytes, bytes};
  if (size == 4 && stored.dims == row && count == BLOCK) return reinterpret_cast<const float*>(from);
  if (size == 4)
    widen_slots(reinterpret_cast<const float*>(from), count, stored.dims, buffer, row);
  else if (size == 2)
    widen_slots(reinterpret_cast<const uint16_t*>(from), count, stored.dims, buffer, row);
  else
    widen_slots(reinterpret_cast<const int8_t*>(from), count, stored.dims, buffer, row);
  return buffer;
}

void times_scales(float* row, const Stored& stored, int64_t b, int64_t k, int64_t s,
                  int64_t count) {
  const float* scales = stored.scales + (b * stored.K + k) * stored.S + s;
  for (int64_t i = 0; i < count; ++i) row[i] *= scales[i];
}

struct Cached {
  Parts queries;
  std::vector<Stored> keys;
  Stored values;
  const int32_t* positions;  // [B, T]
  float scale;
  int64_t B, T, H, K, splits, v_row, rows;
};

// What the slots from split * SPLIT on give the T x G queries of one row and key head: per query its
// softmax so far and the unnormalised mixture.
void read_split(const Cached& c, int64_t b, int64_t k, int64_t split, Running* running,
                float* mixed) {
  Scratch scratch;
  const int64_t group = c.H / c.K;
  std::vector<float*> rows;
  int64_t widest = c.v_row;
  for (const Heads& part : c.queries) {
    const int64_t row = padded(part.dims);
    widest = std::max(widest, row);
    rows.push_back(scratch.take(c.rows * row));
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t g = 0; g < group; ++g) {
        const float* from = part.at(b, t, k * group + g);
        float* to = rows.back() + (t * group + g) * row;
        for (int64_t d = 0; d < part.dims; ++d) to[d] = from[d] * c.scale;
      }
  }
  float* key_buffer = scratch.take(BLOCK * widest);
  float* value_buffer = scratch.take(BLOCK * widest);
  float* columns = scratch.take(BLOCK * widest);
  float* part_scores = scratch.take(c.rows * BLOCK);
  float* scores = scratch.take(c.rows * BLOCK);
  std::memset(mixed, 0, sizeof(float) * c.rows * c.v_row);

  const int32_t* positions = c.positions + b * c.T;
  const int64_t last = *std::max_element(positions, positions + c.T);  // later slots are unseen
  const int64_t end = std::min(std::min((split + 1) * SPLIT, last + 1), c.values.S);
  for (int64_t s = split * SPLIT; s < end; s += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, end - s);
    Ahead next_keys, next_values;
    const float* values = read_slots(c.values, b, k, s, count, value_buffer, c.v_row, &next_values);
    for (size_t part = 0; part < c.keys.size(); ++part) {
      const Stored& key = c.keys[part];
      const int64_t row = padded(key.dims);
      // MLA's latent is key and value at once.
      const float* slots = key.data == c.values.data
                               ? values
                               : read_slots(key, b, k, s, count, key_buffer, row, &next_keys);
      transpose(slots, row, row, columns, &next_keys, &next_values);
      const bool scaled = key.scales != nullptr;
      float* into = scaled ? part_scores : scores;
      matmul(!scaled && part > 0, c.rows, key.dims, BLOCK, {rows[part], row, 1}, columns, BLOCK,
             into, BLOCK);
      if (!scaled) continue;
      for (int64_t r = 0; r < c.rows; ++r) {
        times_scales(into + r * BLOCK, key, b, k, s, count);
        for (int i = 0; i < BLOCK; i += LANES) {
          float* total = scores + r * BLOCK + i;
          store(total, load(into + r * BLOCK + i) + (part > 0 ? load(total) : Vec{}));
        }
      }
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      float* row = scores + r * BLOCK;
      const int64_t seen = std::clamp<int64_t>(positions[r / group] + 1 - s, 0, count);
      for (int64_t i = seen; i < BLOCK; ++i) row[i] = NONE;
      if (seen == 0) {  // a query earlier than this whole block
        std::memset(row, 0, sizeof(float) * BLOCK);
        continue;
      }
      shrink_row(mixed + r * c.v_row, c.v_row, running[r].take(row, BLOCK));
      if (c.values.scales) times_scales(row, c.values, b, k, s, count);
    }
    matmul(true, c.rows, count, c.v_row, {scores, BLOCK, 1}, values, c.v_row, mixed, c.v_row);
  }
}

// Arguments: queries, then per key its values and scales, then those of the values, then positions.
ffi::Error cached_forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          int64_t parts, float scale) {
  Cached c;
  c.scale = scale;
  const auto arg = [&](int64_t i) { return *args.get<ffi::AnyBuffer>(i); };
  c.B = arg(0).dimensions()[0];
  for (int64_t i = 0; i < parts; ++i) {
    c.queries.push_back(heads_of(arg(i)));
    c.keys.push_back(stored_of(arg(parts + 2 * i), arg(parts + 2 * i + 1), c.B));
  }
  c.values = stored_of(arg(3 * parts), arg(3 * parts + 1), c.B);
  c.positions = reinterpret_cast<const int32_t*>(arg(3 * parts + 2).untyped_data());
  c.T = c.queries[0].T, c.H = c.queries[0].heads, c.K = c.values.K;
  c.splits = (c.values.S + SPLIT - 1) / SPLIT;
  c.v_row = padded(c.values.dims), c.rows = c.T * c.H / c.K;

  std::vector<Running> running(c.B * c.K * c.splits * c.rows);
  std::vector<float> mixed(running.size() * c.v_row);
  parallel(pool, c.B * c.K * c.splits, [&](int64_t task) {
    read_split(c, task / c.splits / c.K, task / c.splits % c.K, task % c.splits,
               &running[task * c.rows], &mixed[task * c.rows * c.v_row]);
  });
  // The splits of a query joined: always in one order, so that a result does not depend on the threads.
  const Heads out = heads_of(**rets.get<ffi::AnyBuffer>(0));
  const int64_t group = c.H / c.K;
  std::vector<float> joined(c.v_row);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t r = 0; r < c.rows; ++r) {
        const int64_t first = (b * c.K + k) * c.splits * c.rows + r;
        float largest = NONE, total = 0;
        for (int64_t i = 0; i < c.splits; ++i)
          largest = std::max(largest, running[first + i * c.rows].largest);
        std::fill(joined.begin(), joined.end(), 0.f);
        for (int64_t i = 0; i < c.splits; ++i) {
          const Running& part = running[first + i * c.rows];
          const float share = std::exp(part.largest - largest);
          total += part.total * share;
          const float* from = &mixed[(first + i * c.rows) * c.v_row];
          for (int64_t d = 0; d < c.v_row; ++d) joined[d] += from[d] * share;
        }
        scatter(joined.data(), c.v_row, 1 / total, {out}, b, r / group, 1, k * group + r % group);
      }
  return ffi::Error::Success();
}

// Arguments: an array [B, ..., S, slot] and new slots [B, ..., T, slot] of its dtype, and starts [B];
// the result is the first with each row's new slots from starts[b] on, in the same memory.
ffi::Error append(ffi::AnyBuffer into, ffi::AnyBuffer fresh, ffi::AnyBuffer starts,
                  ffi::Result<ffi::AnyBuffer> out, int64_t slots, int64_t count,
                  int64_t slot_bytes) {
  uint8_t* to = reinterpret_cast<uint8_t*>(out->untyped_data());
  const uint8_t* from = reinterpret_cast<const uint8_t*>(fresh.untyped_data());
  const int32_t* first = reinterpret_cast<const int32_t*>(starts.untyped_data());
  if (to != into.untyped_data()) std::memcpy(to, into.untyped_data(), into.size_bytes());
  const int64_t rows = into.dimensions()[0];
  const int64_t heads = rows == 0 ? 0 : into.size_bytes() / (rows * slots * slot_bytes);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t start = std::clamp<int64_t>(first[b], 0, slots - count);
    for (int64_t h = b * heads; h < (b + 1) * heads; ++h)
      std::memcpy(to + (h * slots + start) * slot_bytes, from + h * count * slot_bytes,
                  count * slot_bytes);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_append, append,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("slots")
                                  .Attr<int64_t>("count")
                                  .Attr<int64_t>("slot_bytes"));

#define HANDLER(name, function)                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function,                        \
                                ffi::Ffi::Bind()                       \
                                    .Ctx<ffi::ThreadPool>()            \
                                    .RemainingArgs()                   \
                                    .RemainingRets()                   \
                                    .Attr<int64_t>("parts")            \
                                    .Attr<float>("scale"))

HANDLER(mla_causal_forward, causal_forward);
HANDLER(mla_causal_backward, causal_backward);
HANDLER(mla_cached_forward, cached_forward);
