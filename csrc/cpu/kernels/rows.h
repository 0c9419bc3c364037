// Dot products and weighted sums of rows: what every operator's inner loops are made of.
//
// The order of the additions depends on the lengths alone.
#pragma once

#include "vec.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

template <typename Acc, typename T>
inline Acc dot(const Acc* x, const T* y, int64_t count) {
  constexpr int kW = kLanes<Acc>;
  Vec<Acc> sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
  int64_t i = 0;
  for (; i + 4 * kW <= count; i += 4 * kW) {
    sum0 += load(x + i) * load(y + i);
    sum1 += load(x + i + kW) * load(y + i + kW);
    sum2 += load(x + i + 2 * kW) * load(y + i + 2 * kW);
    sum3 += load(x + i + 3 * kW) * load(y + i + 3 * kW);
  }
  for (; i + kW <= count; i += kW) sum0 += load(x + i) * load(y + i);
  if (i < count) sum1 += load_partial(x + i, count - i) * load_partial(y + i, count - i);
  return sum_lanes((sum0 + sum1) + (sum2 + sum3));
}

// out[r] = <x, rows[r]> for kRows rows, loading x once. A row's result does not depend on its
// neighbours.
template <int kRows, typename Acc, typename T>
inline void dot_rows(const Acc* x, const T* const* rows, int64_t offset, int64_t count, Acc* out) {
  constexpr int kW = kLanes<Acc>;
  Vec<Acc> sum[kRows][2] = {};
  int64_t i = 0;
  for (; i + 2 * kW <= count; i += 2 * kW) {
    const Vec<Acc> low = load(x + i), high = load(x + i + kW);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const T* row = rows[r] + offset + i;
      sum[r][0] += low * load(row);
      sum[r][1] += high * load(row + kW);
    }
  }
  for (; i < count; i += kW) {
    const int64_t rest = smaller<int64_t>(kW, count - i);
    const Vec<Acc> part = load_partial(x + i, rest);
    for (int r = 0; r < kRows; ++r) sum[r][0] += part * load_partial(rows[r] + offset + i, rest);
  }
  for (int r = 0; r < kRows; ++r) out[r] = sum_lanes(sum[r][0] + sum[r][1]);
}

// out[k] = <x + k * stride, y> for four k, loading y once.
template <typename Acc, typename T>
inline void dot_four(const Acc* x, int64_t stride, const T* y, int64_t count, Acc* out) {
  constexpr int kW = kLanes<Acc>;
  Vec<Acc> sum[4][2] = {};
  int64_t i = 0;
  for (; i + 2 * kW <= count; i += 2 * kW) {
    const Vec<Acc> low = load(y + i), high = load(y + i + kW);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      sum[k][0] += load(x + k * stride + i) * low;
      sum[k][1] += load(x + k * stride + i + kW) * high;
    }
  }
  for (; i < count; i += kW) {
    const int64_t rest = smaller<int64_t>(kW, count - i);
    const Vec<Acc> row = load_partial(y + i, rest);
    for (int k = 0; k < 4; ++k) sum[k][0] += load_partial(x + k * stride + i, rest) * row;
  }
  for (int k = 0; k < 4; ++k) out[k] = sum_lanes(sum[k][0] + sum[k][1]);
}

// Into the second-level cache, which has room for more lines on their way than the first.
template <typename T>
ULTRAMEM_ALWAYS_INLINE void prefetch_row(const T* row, int64_t count) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(row);
  const uintptr_t end = begin + static_cast<uintptr_t>(count) * sizeof(T);
  for (uintptr_t line = begin / 64 * 64; line < end; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
  }
}

// sum += weight * row
template <typename Acc, typename T>
inline void add_scaled(Acc* sum, Acc weight, const T* row, int64_t count) {
  constexpr int kW = kLanes<Acc>;
  int64_t i = 0;
  for (; i + kW <= count; i += kW) store(sum + i, load(sum + i) + load(row + i) * weight);
  for (; i < count; ++i) sum[i] += to_acc(row[i]) * weight;
}

template <typename T>
inline void widen(AccOf<T>* to, const T* from, int64_t count) {
  constexpr int kW = kLanes<AccOf<T>>;
  int64_t i = 0;
  for (; i + kW <= count; i += kW) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_acc(from[i]);
}

template <typename T>
inline void round_to(T* to, const AccOf<T>* from, int64_t count) {
  constexpr int kW = kLanes<AccOf<T>>;
  int64_t i = 0;
  for (; i + kW <= count; i += kW) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from_acc<T>(from[i]);
}

template <typename T>
inline void set_zero(T* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(T));
}

template <int value>
struct Constant {
  static constexpr int kValue = value;
};

// A weighted sum's terms; more than kMaxTerms are added in pieces of that length, which also keeps
// the rounding error of long sums small.
constexpr int kMaxTerms = 512;

template <typename Row>
struct Terms {
  int count = 0;
  AccOf<Row> weight[kMaxTerms];
  const Row* row[kMaxTerms];

  void add(AccOf<Row> w, const Row* r) {
    weight[count] = w;
    row[count++] = r;
  }
};

struct NoFetch {
  ULTRAMEM_ALWAYS_INLINE void operator()(int) const {}
};

// The columns [first, first + kVecs * lanes) of weighted_sum, in registers.
template <int kVecs, typename Out, typename Row, typename Fetch>
ULTRAMEM_ALWAYS_INLINE void weighted_sum_columns(Out* out, const Terms<Row>& terms, int64_t first,
                                                 const AccOf<Row>* carry, bool accumulate,
                                                 const Fetch& fetch) {
  using Acc = AccOf<Row>;
  constexpr int kW = kLanes<Acc>;
  Vec<Acc> sum[kVecs] = {};
  for (int e = 0; e < terms.count; ++e) {
    fetch(e);
    const Acc weight = terms.weight[e];
    const Row* row = terms.row[e] + first;
#pragma GCC unroll 12
    for (int v = 0; v < kVecs; ++v) sum[v] += load(row + v * kW) * weight;
  }
#pragma GCC unroll 12
  for (int v = 0; v < kVecs; ++v) {
    const int64_t column = first + v * kW;
    if (carry != nullptr) sum[v] += load(carry + column);
    if (accumulate) sum[v] += load(out + column);
    store(out + column, sum[v]);
  }
}

// out[j] = sum_e weight[e] * row[e][j] + carry[j] (unless null) + out[j] (if accumulate), rounded
// once. Calls fetch(e) once for each term, before it reads the term's row for the first time.
template <typename Out, typename Row, typename Fetch = NoFetch>
inline void weighted_sum(Out* out, int64_t columns, const Terms<Row>& terms,
                         const AccOf<Row>* carry, bool accumulate, const Fetch& fetch = {}) {
  using Acc = AccOf<Row>;
  constexpr int kW = kLanes<Acc>;
  constexpr int kMaxVecs = kVecRegisters >= 32 ? 12 : 6;
  int64_t j = 0;
  const auto advance = [&](auto vecs) {
    constexpr int kVecs = decltype(vecs)::kValue;
    for (; j + kVecs * kW <= columns; j += kVecs * kW) {
      if (j == 0) {
        weighted_sum_columns<kVecs>(out, terms, j, carry, accumulate, fetch);
      } else {
        weighted_sum_columns<kVecs>(out, terms, j, carry, accumulate, NoFetch{});
      }
    }
  };
  advance(Constant<kMaxVecs>{});
  advance(Constant<6>{});
  advance(Constant<2>{});
  advance(Constant<1>{});
  if (j == 0) {
    for (int e = 0; e < terms.count; ++e) fetch(e);
  }
  for (; j < columns; ++j) {
    Acc sum = 0;
    for (int e = 0; e < terms.count; ++e) sum += to_acc(terms.row[e][j]) * terms.weight[e];
    if (carry != nullptr) sum += carry[j];
    if (accumulate) sum += to_acc(out[j]);
    out[j] = from_acc<Out>(sum);
  }
}

}  // namespace
}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
