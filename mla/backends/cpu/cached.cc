// Attention through a cache, and writing to one. XLA's CPU backend converts a bfloat16 or int8 cache in
// memory before it reads it; here it comes from memory once, in the dtype in which it lies.
#include <type_traits>

#include "attention.h"

namespace {

constexpr int64_t SPLIT = 2048;  // cache slots one task reads
constexpr int64_t FEW = 8;       // queries of a key head; for more a transpose of the slots pays

struct Stored {  // values [B K, S, dims] in the cache's dtype, and for int8 scales [B K, S]
  const uint8_t* data;
  const float* scales;
  ffi::DataType dtype;
  int64_t K, S, dims;
};

// Array i of a call, and array i + 1 as its scales, once they have these sizes.
Stored stored_of(ffi::RemainingArgs& args, int64_t i, const char* name, int64_t B, int64_t S,
                 int64_t dims) {
  const ffi::AnyBuffer values = fitting(
      array_of(args, i), name, {ffi::DataType::F32, ffi::DataType::BF16, ffi::DataType::S8},
      {ANY, S, dims});
  const auto shape = values.dimensions();
  require(shape[0] % B == 0, "cache: its first axis must hold each row's heads");
  const bool scaled = values.element_type() == ffi::DataType::S8;
  const float* scales = nullptr;
  if (scaled)
    scales = reinterpret_cast<const float*>(
        fitting(array_of(args, i + 1), "scales", {ffi::DataType::F32}, {shape[0], shape[1]})
            .untyped_data());
  return {reinterpret_cast<const uint8_t*>(values.untyped_data()),
          scales,
          values.element_type(),
          shape[0] / B,
          shape[1],
          shape[2]};
}

// Where the slots of key head k begin: its own, or those of the only head, which all share.
inline int64_t first_slot(const Stored& stored, int64_t b, int64_t k) {
  return (b * stored.K + k % stored.K) * stored.S;
}

template <typename Element>
const Element* slots_of(const Stored& stored, int64_t b, int64_t k, int64_t s) {
  return reinterpret_cast<const Element*>(stored.data) +
         (first_slot(stored, b, k) + s) * stored.dims;
}

// run(an element of that dtype)
template <typename Run>
void with_element(ffi::DataType dtype, const Run& run) {
  if (dtype == ffi::DataType::F32)
    run(float{});
  else if (dtype == ffi::DataType::BF16)
    run(uint16_t{});
  else
    run(int8_t{});
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
    for (int64_t i = 0; i < count * dims; i += LANES) store(out + i, load(from + i));
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
  const float* slots = buffer;
  with_element(stored.dtype, [&](auto element) {
    const auto* from = slots_of<decltype(element)>(stored, b, k, s);
    const int64_t bytes = BLOCK * stored.dims * sizeof *from;
    *ahead = {reinterpret_cast<const uint8_t*>(from) + bytes, bytes};
    if constexpr (std::is_same_v<decltype(element), float>)
      if (stored.dims == row && count == BLOCK) {
        slots = from;
        return;
      }
    widen_slots(from, count, stored.dims, buffer, row);
  });
  return slots;
}

void times_scales(float* row, const Stored& stored, int64_t b, int64_t k, int64_t s,
                  int64_t count) {
  const float* scales = stored.scales + first_slot(stored, b, k) + s;
  for (int64_t i = 0; i < count; ++i) row[i] *= scales[i];
}

struct Cached {
  Parts queries;
  std::vector<Stored> keys;
  Stored values;
  const int32_t* positions;  // [B, T]
  const int32_t* starts;     // [B, T], or null
  float scale;
  int64_t B, T, H, K, splits, v_row, rows;
};

// Makes scores of slots s .. s + count weights, as far as query r sees them; the softmax goes on.
float to_weights(const Cached& c, int64_t b, int64_t k, int64_t s, int64_t count, int64_t r,
                 Running* running, float* row) {
  const int64_t query = b * c.T + r / (c.H / c.K);
  const int64_t seen = std::clamp<int64_t>(c.positions[query] + 1 - s, 0, count);
  const int64_t hidden = c.starts ? std::clamp<int64_t>(c.starts[query] - s, 0, seen) : 0;
  const int64_t cols = padded(count);
  if (seen == hidden) {  // a query earlier than all of these, or of a later document
    std::memset(row, 0, sizeof(float) * cols);
    return 1;
  }
  std::fill(row, row + hidden, NONE);
  for (int64_t i = seen; i < cols; ++i) row[i] = NONE;
  const float shrink = running[r].take(row, cols);
  if (c.values.scales) times_scales(row, c.values, b, k, s, count);
  return shrink;
}

// Slots s .. end for at most FEW queries: all keys, then the softmax, then all values. Each array is
// read as a stream, at the speed of memory, which is the limit for few queries.
template <typename Element>
void read_for_few(const Cached& c, int64_t b, int64_t k, int64_t s, int64_t end,
                  const std::vector<float*>& rows, Scratch& scratch, Running* running,
                  float* mixed) {
  const int64_t count = end - s;
  float* scores = scratch.take(c.rows * SPLIT);
  float* part_scores = scratch.take(c.rows * SPLIT);
  const auto pair = [&](size_t part) {
    const Stored& key = c.keys[part];
    return Pair<Element>{rows[part], slots_of<Element>(key, b, k, s), key.dims};
  };
  if (c.keys.size() == 2 && !c.keys[0].scales) {
    Pair<Element> both[] = {pair(0), pair(1)};
    dots(c.rows, both, count, scores, SPLIT);
  } else {
    for (size_t part = 0; part < c.keys.size(); ++part) {
      float* into = part == 0 ? scores : part_scores;
      Pair<Element> one[] = {pair(part)};
      dots(c.rows, one, count, into, SPLIT);
      for (int64_t r = 0; r < c.rows; ++r) {
        float *of_part = into + r * SPLIT, *total = scores + r * SPLIT;
        if (c.keys[part].scales) times_scales(of_part, c.keys[part], b, k, s, count);
        for (int64_t i = 0; part > 0 && i < count; ++i) total[i] += of_part[i];
      }
    }
  }
  for (int64_t r = 0; r < c.rows; ++r)
    to_weights(c, b, k, s, count, r, running, scores + r * SPLIT);
  const Element* values = slots_of<Element>(c.values, b, k, s);
  for (int64_t i = 0; i < count; i += BLOCK)  // wide values' last columns are then read from cache
    matmul<FEW>(true, c.rows, std::min<int64_t>(BLOCK, count - i), c.v_row, {scores + i, SPLIT, 1},
                values + i * c.v_row, c.v_row, mixed, c.v_row);
}

// Slots s .. end for all queries, a block at a time.
void read_for_many(const Cached& c, int64_t b, int64_t k, int64_t s, int64_t end,
                   const std::vector<float*>& rows, Scratch& scratch, Running* running,
                   float* mixed) {
  int64_t widest = c.v_row;
  for (const Stored& key : c.keys) widest = std::max(widest, padded(key.dims));
  float* key_buffer = scratch.take(BLOCK * widest);
  float* value_buffer = scratch.take(BLOCK * widest);
  float* columns = scratch.take(BLOCK * widest);
  float* part_scores = scratch.take(c.rows * BLOCK);
  float* scores = scratch.take(c.rows * BLOCK);
  for (; s < end; s += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, end - s);
    Ahead next_keys, next_values;
    const float* values = read_slots(c.values, b, k, s, count, value_buffer, c.v_row, &next_values);
    for (size_t part = 0; part < c.keys.size(); ++part) {
      const Stored& key = c.keys[part];
      const int64_t row = padded(key.dims);
      // MLA's latent is key and value at once.
      const float* slots = key.data == c.values.data && key.dims == c.values.dims
                               ? values
                               : read_slots(key, b, k, s, count, key_buffer, row, &next_keys);
      transpose(slots, row, row, columns, &next_keys, &next_values);
      const bool scaled = key.scales != nullptr, add = !scaled && part > 0;
      float* into = scaled ? part_scores : scores;
      matmul(add, c.rows, key.dims, BLOCK, {rows[part], row, 1}, columns, BLOCK, into, BLOCK);
      if (!scaled) continue;
      for (int64_t r = 0; r < c.rows; ++r) {
        times_scales(into + r * BLOCK, key, b, k, s, count);
        for (int i = 0; i < BLOCK; i += LANES) {
          float* total = scores + r * BLOCK + i;
          store(total, load(into + r * BLOCK + i) + (part > 0 ? load(total) : Vec{}));
        }
      }
    }
    for (int64_t r = 0; r < c.rows; ++r)
      shrink_row(mixed + r * c.v_row, c.v_row,
                 to_weights(c, b, k, s, count, r, running, scores + r * BLOCK));
    matmul(true, c.rows, count, c.v_row, {scores, BLOCK, 1}, values, c.v_row, mixed, c.v_row);
  }
}

// What the slots from split * SPLIT on give the T x G queries of one row and key head: per query its
// softmax so far and the unnormalised mixture.
void read_split(const Cached& c, int64_t b, int64_t k, int64_t split, Running* running,
                float* mixed) {
  std::memset(mixed, 0, sizeof(float) * c.rows * c.v_row);
  const int32_t* positions = c.positions + b * c.T;
  const int64_t last = *std::max_element(positions, positions + c.T);  // later slots are unseen
  // A row with more tokens than slots: nothing is read, so that all it gets is 0 / 0, NaN.
  if (last >= c.values.S) return;
  const int64_t end = std::min((split + 1) * SPLIT, last + 1);
  int64_t start = split * SPLIT;
  if (c.starts) {  // earlier slots are unseen too
    const int32_t* starts = c.starts + b * c.T;
    start = std::max<int64_t>(start, *std::min_element(starts, starts + c.T) / BLOCK * BLOCK);
  }
  if (end <= start) return;

  Scratch scratch;
  const int64_t group = c.H / c.K;
  bool whole = c.values.dims == c.v_row;  // slots of whole vectors and one dtype
  for (const Stored& key : c.keys)
    whole &= key.dims == padded(key.dims) && key.dtype == c.values.dtype;
  std::vector<float*> rows;
  for (const Heads& part : c.queries) {
    const int64_t row = padded(part.dims);
    rows.push_back(scratch.take(c.rows * row));
    std::memset(rows.back(), 0, sizeof(float) * c.rows * row);  // beyond a query's dims too
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t g = 0; g < group; ++g)
        copy_scaled(part.at(b, t, k * group + g), part.dims, c.scale,
                    rows.back() + (t * group + g) * row);
  }
  if (c.rows > FEW || !whole)
    return read_for_many(c, b, k, start, end, rows, scratch, running, mixed);
  with_element(c.values.dtype, [&](auto element) {
    read_for_few<decltype(element)>(c, b, k, start, end, rows, scratch, running, mixed);
  });
}

Cached checked(ffi::RemainingArgs& args, ffi::RemainingRets& rets, int64_t parts, float scale) {
  require(0 < parts && parts <= MOST_PARTS, "parts: must be 1 to 64");
  const size_t given = 3 * parts + 3;
  require(args.size() == given || args.size() == given + 1,
          "cached attention: wrong number of arguments");
  require(rets.size() == 1, "cached attention: wrong number of results");
  Cached c;
  c.scale = scale;
  c.queries.push_back(heads_of(args, 0, "queries", {ANY, ANY, ANY, ANY}));
  c.B = array_of(args, 0).dimensions()[0], c.T = c.queries[0].T, c.H = c.queries[0].heads;
  c.values = stored_of(args, 3 * parts, "cached values", c.B, ANY, ANY), c.K = c.values.K;
  require(c.H % c.K == 0, "queries: the heads of the values must divide theirs");
  for (int64_t i = 0; i < parts; ++i) {
    if (i > 0) c.queries.push_back(heads_of(args, i, "queries", {c.B, c.T, c.H, ANY}));
    c.keys.push_back(
        stored_of(args, parts + 2 * i, "cached keys", c.B, c.values.S, c.queries[i].dims));
    require(c.keys[i].K == 1 || c.keys[i].K == c.K, "cached keys: one head, or the values'");
  }
  c.positions = reinterpret_cast<const int32_t*>(
      fitting(array_of(args, 3 * parts + 2), "positions", {ffi::DataType::S32}, {c.B, c.T})
          .untyped_data());
  c.starts = starts_of(args, given, c.B, c.T);
  c.splits = (c.values.S + SPLIT - 1) / SPLIT;
  c.v_row = padded(c.values.dims), c.rows = c.T * c.H / c.K;
  return c;
}

void attend(ffi::ThreadPool pool, const Cached& c, Heads out) {
  std::vector<Running> running(c.B * c.K * c.splits * c.rows);
  std::vector<float> mixed(running.size() * c.v_row);
  parallel(pool, c.B * c.K * c.splits, [&](int64_t task) {
    read_split(c, task / c.splits / c.K, task / c.splits % c.K, task % c.splits,
               &running[task * c.rows], &mixed[task * c.rows * c.v_row]);
  });
  // The splits of a query joined: always in one order, so that a result does not depend on the threads.
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
}

// Arguments: queries, then per key its values and scales, then those of the values, then positions,
// then perhaps starts.
ffi::Error cached_forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          int64_t parts, float scale) {
  return answer([&] {
    const Cached c = checked(args, rets, parts, scale);
    attend(pool, c, heads_of(rets, 0, "output", {c.B, c.T, c.H, c.values.dims}));
  });
}

int64_t product(ffi::Span<const int64_t> sizes, int64_t from, int64_t to) {
  int64_t all = 1;
  for (int64_t i = from; i < to; ++i) all *= sizes[i];
  return all;
}

// Arguments: an array [B, ..., S, slot] and new slots [B, ..., T, slot] of its dtype, and starts [B];
// S and T are axis `axis`. The result is the first with each row's new slots from starts[b] on, in the
// same memory. A row that they would run over the end of stays as it was.
ffi::Error append(ffi::AnyBuffer into, ffi::AnyBuffer fresh, ffi::AnyBuffer starts,
                  ffi::Result<ffi::AnyBuffer> out, int64_t axis) {
  return answer([&] {
    const auto dtype = into.element_type();
    const int64_t width = dtype == ffi::DataType::F32    ? 4
                          : dtype == ffi::DataType::BF16 ? 2
                          : dtype == ffi::DataType::S8   ? 1
                                                         : 0;
    require(width > 0, "cache: must be float32, bfloat16 or int8");
    const auto sizes = into.dimensions(), given = fresh.dimensions(), filled = out->dimensions();
    const int64_t rank = sizes.size();
    require(0 < axis && axis < rank, "axis: must be one of the cache's but the first");
    require(fresh.element_type() == dtype && given.size() == sizes.size(),
            "new slots: must have the cache's dtype and rank");
    for (int64_t i = 0; i < rank; ++i)
      require(i == axis ? given[i] <= sizes[i] : given[i] == sizes[i],
              "new slots: must have the cache's sizes, and at most as many slots");
    require(out->element_type() == dtype && filled.size() == sizes.size() &&
                std::equal(sizes.begin(), sizes.end(), filled.begin()),
            "result: must be like the cache");
    fitting(starts, "starts", {ffi::DataType::S32}, {sizes[0]});

    uint8_t* to = reinterpret_cast<uint8_t*>(out->untyped_data());
    const uint8_t* from = reinterpret_cast<const uint8_t*>(fresh.untyped_data());
    const int32_t* first = reinterpret_cast<const int32_t*>(starts.untyped_data());
    if (to != into.untyped_data()) std::memcpy(to, into.untyped_data(), into.size_bytes());
    const int64_t slots = sizes[axis], count = given[axis], heads = product(sizes, 1, axis);
    const int64_t slot_bytes = product(sizes, axis + 1, rank) * width;
    for (int64_t b = 0; b < sizes[0]; ++b) {
      if (first[b] < 0 || first[b] > slots - count) continue;
      for (int64_t h = b * heads; h < (b + 1) * heads; ++h)
        std::memcpy(to + (h * slots + first[b]) * slot_bytes, from + h * count * slot_bytes,
                    count * slot_bytes);
    }
  });
}

}  // namespace

HANDLER(mla_cached_forward, cached_forward);
XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_append, append,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("axis"));
