// What an entry asks of its arrays before it reads any of them. They come from whoever calls: a wrong
// dtype, rank, size or number of heads would be read out of bounds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <sstream>
#include <stdexcept>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int64_t ANY = -1;          // of a size: any but 0
constexpr int64_t MOST_PARTS = 64;  // of a score; only keeps their number from overflowing

struct Unfit : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void require(bool holds, const char* message) {
  if (!holds) throw Unfit(message);
}

// The array, once it is of one of these dtypes and has these sizes.
inline ffi::AnyBuffer fitting(ffi::AnyBuffer array, const char* name,
                              std::initializer_list<ffi::DataType> dtypes,
                              std::initializer_list<int64_t> sizes) {
  const auto found = array.dimensions();
  const auto fits = [](int64_t size, int64_t asked) { return asked == ANY ? size > 0 : size == asked; };
  if (std::count(dtypes.begin(), dtypes.end(), array.element_type()) == 1 &&
      found.size() == sizes.size() && std::equal(found.begin(), found.end(), sizes.begin(), fits))
    return array;
  std::ostringstream said;
  said << name << ": must be";
  for (auto dtype : dtypes) said << ' ' << dtype;
  said << " [";
  for (auto size : sizes) size == ANY ? said << " ?" : said << ' ' << size;
  said << " ]; got " << array.element_type() << " [";
  for (auto size : found) said << ' ' << size;
  said << " ]";
  throw Unfit(said.str());
}

// The i-th of the arrays an entry is given, or of those it fills.
inline ffi::AnyBuffer array_of(ffi::RemainingArgs& args, int64_t i) {
  return *args.get<ffi::AnyBuffer>(i);
}
inline ffi::AnyBuffer array_of(ffi::RemainingRets& rets, int64_t i) {
  return **rets.get<ffi::AnyBuffer>(i);
}

// run(), with what it refused as the call's error.
template <typename Run>
ffi::Error answer(const Run& run) {
  try {
    run();
    return ffi::Error::Success();
  } catch (const Unfit& unfit) {
    return ffi::Error::InvalidArgument(unfit.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention in C++: too little memory");
  }
}

}  // namespace
