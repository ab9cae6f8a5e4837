// Causal attention and its gradient. XLA's CPU backend runs softmax(Q K^T) V as separate programs over
// small matrices; here a block of scores never leaves a core's first caches.
#include "attention.h"

namespace {

constexpr int STRIP = 16;  // queries that see as many keys, in a block on the diagonal

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
  for (const Heads& part : parts) {
    const float* from = part.at(b, t, h * part.heads / heads);  // fewer heads: each for several
    for (int64_t i = 0; i < count; ++i, from += part.heads * part.dims)
      copy_scaled(from, part.dims, scale, out + i * row);
    out += part.dims;
  }
}

inline float inner(const float* a, const float* b, int64_t dims) {
  Vec sums{};
  int64_t d = 0;
  for (; d + LANES <= dims; d += LANES) sums += load(a + d) * load(b + d);
  float total = sum(sums);
  for (; d < dims; ++d) total += a[d] * b[d];
  return total;
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

// The first `hidden` of a row's keys, which are of other documents.
inline void hide_earlier(float* scores, int64_t hidden, int64_t keys) {
  std::fill(scores, scores + std::min(hidden, keys), NONE);
}

struct Causal {
  Parts queries, keys;
  Heads values;
  const int32_t* starts;  // or null
  float scale;
  int64_t B, T, H, K, n, n_row, v_row, blocks;

  // `more` arrays follow the values, then perhaps the starts, and `results` are to be filled.
  Causal(ffi::RemainingArgs& args, ffi::RemainingRets& rets, int64_t parts, float scale, size_t more,
         size_t results)
      : scale(scale) {
    require(0 < parts && parts <= MOST_PARTS, "parts: must be 1 to 64");
    const size_t given = 2 * parts + 1 + more;
    require(args.size() == given || args.size() == given + 1,
            "causal attention: wrong number of arguments");
    require(rets.size() == results, "causal attention: wrong number of results");
    queries.push_back(heads_of(args, 0, "queries", {ANY, ANY, ANY, ANY}));
    B = array_of(args, 0).dimensions()[0], T = queries[0].T, H = queries[0].heads;
    values = heads_of(args, 2 * parts, "values", {B, T, ANY, ANY}), K = values.heads;
    require(H % K == 0, "queries: the heads of the values must divide theirs");
    for (int64_t i = 0; i < parts; ++i) {
      if (i > 0) queries.push_back(heads_of(args, i, "queries", {B, T, H, ANY}));
      keys.push_back(heads_of(args, parts + i, "keys", {B, T, ANY, queries[i].dims}));
      require(keys[i].heads == 1 || keys[i].heads == K, "keys: must have one head or the values'");
    }
    starts = starts_of(args, given, B, T);
    n = dims_of(queries);
    n_row = padded(n), v_row = padded(values.dims), blocks = (T + BLOCK - 1) / BLOCK;
  }
  int64_t count(int64_t block) const { return std::min<int64_t>(BLOCK, T - block * BLOCK); }

  // The first block of keys of which a query of block i sees any.
  int64_t first_block(int64_t b, int64_t i) const {
    if (!starts) return 0;
    const int32_t* own = starts + b * T + i * BLOCK;
    const int64_t first = *std::min_element(own, own + count(i));
    return std::clamp<int64_t>(first / BLOCK, 0, i);
  }

  // Keys of block j that lie before the document of query r of block i.
  int64_t hidden(int64_t b, int64_t i, int64_t r, int64_t j) const {
    if (!starts) return 0;
    return std::clamp<int64_t>(starts[b * T + i * BLOCK + r] - j * BLOCK, 0, BLOCK);
  }
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
      for (int64_t j = c.first_block(b, i); j <= i; ++j) {
        visit_strips(j == i, count, [&](int64_t first, int64_t height, int64_t seen) {
          matmul(false, height, c.n, seen, {rows + first * c.n_row, c.n_row, 1},
                 columns + j * c.n_row * BLOCK, BLOCK, scores, BLOCK);
          for (int64_t r = first; r < first + height; ++r) {
            float* row = scores + (r - first) * BLOCK;
            if (j == i) hide_later(row, r, seen);
            const int64_t hidden = c.hidden(b, i, r, j);
            if (hidden > 0 && hidden >= (j == i ? r + 1 : seen)) {  // all of them
              std::memset(row, 0, sizeof(float) * seen);
              continue;
            }
            hide_earlier(row, hidden, seen);
            shrink_row(mixed + r * c.v_row, c.v_row, running[r].take(row, seen));
          }
          matmul(true, height, seen, c.v_row, {scores, BLOCK, 1}, values + j * BLOCK * c.v_row,
                 c.v_row, mixed + first * c.v_row, c.v_row);
        });
      }
      for (int64_t r = 0; r < count; ++r) {
        shrink_row(mixed + r * c.v_row, c.v_row, 1 / running[r].total);
        log_sums[(b * c.H + h) * c.T + i * BLOCK + r] =
            running[r].largest + std::log(running[r].total);
      }
      scatter(mixed, c.v_row, 1, {out}, b, i * BLOCK, count, h);
    }
}

ffi::Error causal_forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          int64_t parts, float scale) {
  return answer([&] {
    const Causal c(args, rets, parts, scale, 0, 2);
    const Heads out = heads_of(rets, 0, "output", {c.B, c.T, c.H, c.values.dims});
    float* log_sums = sums_of(rets, 1, c.B, c.H, c.T);
    parallel(pool, c.B * c.K,
             [&](int64_t task) { forward_of_head(c, task / c.K, task % c.K, out, log_sums); });
  });
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
      for (int64_t r = 0; r < count; ++r)
        means[r] = inner(out.at(b, i * BLOCK + r, h), d_rows + r * c.v_row, out.dims);
      std::memset(d_queries, 0, sizeof(float) * BLOCK * c.n_row);
      for (int64_t j = c.first_block(b, i); j <= i; ++j) {
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
            hide_earlier(row, c.hidden(b, i, r, j), seen);
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
  return answer([&] {
    const Causal c(args, rets, parts, scale, 3, 2 * parts + 1);
    const int64_t V = c.values.dims;
    const Heads out = heads_of(args, 2 * parts + 1, "output", {c.B, c.T, c.H, V});
    const float* log_sums = sums_of(args, 2 * parts + 2, c.B, c.H, c.T);
    const Heads d_out = heads_of(args, 2 * parts + 3, "output's gradient", {c.B, c.T, c.H, V});
    Gradients to;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t dims = c.queries[i].dims;
      to.queries.push_back(heads_of(rets, i, "queries' gradient", {c.B, c.T, c.H, dims}));
      to.keys.push_back(heads_of(rets, parts + i, "keys' gradient", {c.B, c.T, c.K, dims}));
    }
    to.values = heads_of(rets, 2 * parts, "values' gradient", {c.B, c.T, c.K, V});
    parallel(pool, c.B * c.K, [&](int64_t task) {
      backward_of_head(c, task / c.K, task % c.K, out, log_sums, d_out, to);
    });
  });
}

}  // namespace

HANDLER(mla_causal_forward, causal_forward);
HANDLER(mla_causal_backward, causal_backward);
