// What attention over a block and attention through a cache share: tasks on XLA's threads, their
// memory, where a head's tokens lie, and a softmax that goes on from block to block. Letters are the
// house's (B T S H K G V; n: a key's dims).
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "checks.h"
#include "matrices.h"

namespace {

// run(0) .. run(tasks - 1), on this thread and on those of XLA's pool that are free. This thread waits
// for nothing but tasks already begun, so it is safe on a pool whose threads all wait like this. Where
// one has too little memory, the others end first: they read what this call holds.
template <typename Run>
void parallel(ffi::ThreadPool pool, int64_t tasks, const Run& run) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, tasks, &run] {
    for (int64_t task; (task = shared->next++) < tasks; ++shared->done) try {
        run(task);
      } catch (const std::bad_alloc&) {
        shared->failed = true;
      }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  while (shared->done < tasks) std::this_thread::yield();
  if (shared->failed) throw std::bad_alloc();
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
      piece = {};  // or it and its successor would be held at once
      piece.memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (!piece.memory) throw std::bad_alloc();
      piece.floats = floats;
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

struct Heads {  // [B, T, heads, dims]
  float* data;
  int64_t T, heads, dims;
  float* at(int64_t b, int64_t t, int64_t h) const {
    return data + ((b * T + t) * heads + h) * dims;
  }
};

// The i-th array that a call gives or fills, once it has these sizes.
template <typename Arrays>
Heads heads_of(Arrays& arrays, int64_t i, const char* name, std::initializer_list<int64_t> sizes) {
  const ffi::AnyBuffer array = fitting(array_of(arrays, i), name, {ffi::DataType::F32}, sizes);
  const auto shape = array.dimensions();
  return {reinterpret_cast<float*>(array.untyped_data()), shape[1], shape[2], shape[3]};
}

// Likewise the sums [B, H, T].
template <typename Arrays>
float* sums_of(Arrays& arrays, int64_t i, int64_t B, int64_t H, int64_t T) {
  const ffi::AnyBuffer array =
      fitting(array_of(arrays, i), "log sums", {ffi::DataType::F32}, {B, H, T});
  return reinterpret_cast<float*>(array.untyped_data());
}

// Where each token's document begins in its row, [B, T]: array `given`, which a call may leave out.
inline const int32_t* starts_of(ffi::RemainingArgs& args, size_t given, int64_t B, int64_t T) {
  if (args.size() == given) return nullptr;
  return reinterpret_cast<const int32_t*>(
      fitting(array_of(args, given), "starts", {ffi::DataType::S32}, {B, T}).untyped_data());
}

using Parts = std::vector<Heads>;

inline void copy_scaled(const float* from, int64_t dims, float scale, float* to) {
  int64_t d = 0;
  for (; d + LANES <= dims; d += LANES) store(to + d, load(from + d) * scale);
  for (; d < dims; ++d) to[d] = from[d] * scale;
}

// Rows of `row` floats times `scale` to tokens t .. t + count of one head, its parts side by side.
void scatter(const float* in, int64_t row, float scale, const Parts& parts, int64_t b, int64_t t,
             int64_t count, int64_t h) {
  for (const Heads& part : parts) {
    float* to = part.at(b, t, h);
    for (int64_t i = 0; i < count; ++i, to += part.heads * part.dims)
      copy_scaled(in + i * row, part.dims, scale, to);
    in += part.dims;
  }
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

}  // namespace

#define HANDLER(name, function)                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function,                        \
                                ffi::Ffi::Bind()                       \
                                    .Ctx<ffi::ThreadPool>()            \
                                    .RemainingArgs()                   \
                                    .RemainingRets()                   \
                                    .Attr<int64_t>("parts")            \
                                    .Attr<float>("scale"))
