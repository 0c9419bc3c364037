// The filter scores u.S_row and t.S_col of all keys, as a register-tiled matrix product.
//
// sum_r u_r <q_r, k_{i,r}> is one dot product over R * Kd numbers once u is folded into the query;
// where the ranks share a query, u is folded into the keys instead and the depth is Kd. Every
// (token, key) dot is one chain of fused multiply-adds over the depth, whatever tile it falls in:
// so identical keys get identical scores.
#pragma once

#include "ultramem/product_key_topk.h"
#include "vec.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

// A tile of kTileTokens x kTileKeys scores lives in registers: two vectors of keys, and as many
// tokens as leave registers for the operands.
constexpr int kTileTokens =
    kVecRegisters == 32 ? (kVecBytes == 64 ? 12 : 8) : (kVecBytes == 32 ? 6 : 4);
template <typename Acc>
constexpr int kTileKeys = 2 * kLanes<Acc>;

struct AxisShape {
  int64_t num_keys;
  int64_t key_dim;
  int64_t num_queries;
  int64_t tucker_rank;

  bool ranks_share_query() const { return num_queries < tucker_rank; }
  int64_t depth() const { return ranks_share_query() ? key_dim : tucker_rank * key_dim; }
};

// panel[d][key] of the keys [first, first + kTileKeys) of one head and side, zero beyond num_keys.
// keys [R, n, Kd]; filter [R] or null.
template <typename T>
void pack_keys(const T* keys, const AccOf<T>* filter, const AxisShape& shape, int64_t first,
               AccOf<T>* panel) {
  using Acc = AccOf<T>;
  constexpr int kPanel = kTileKeys<Acc>;
  constexpr int64_t kStep = kLanes<Acc>;  // a cache line of several keys at a time
  const int64_t count = smaller<int64_t>(kPanel, shape.num_keys - first);
  const bool fold = shape.ranks_share_query();
  if (count < kPanel) {
    __builtin_memset(panel, 0, static_cast<size_t>(shape.depth() * kPanel) * sizeof(Acc));
  }
  for (int64_t r = 0; r < shape.tucker_rank; ++r) {
    const T* rows = keys + (r * shape.num_keys + first) * shape.key_dim;
    Acc* out = panel + (fold ? 0 : r * shape.key_dim * kPanel);
    for (int64_t d0 = 0; d0 < shape.key_dim; d0 += kStep) {
      const int64_t d1 = smaller(shape.key_dim, d0 + kStep);
      for (int64_t key = 0; key < count; ++key) {
        const T* row = rows + key * shape.key_dim;
        if (!fold) {
          for (int64_t d = d0; d < d1; ++d) out[d * kPanel + key] = to_acc(row[d]);
        } else if (r == 0) {
          for (int64_t d = d0; d < d1; ++d) out[d * kPanel + key] = filter[0] * to_acc(row[d]);
        } else {
          for (int64_t d = d0; d < d1; ++d) out[d * kPanel + key] += filter[r] * to_acc(row[d]);
        }
      }
    }
  }
}

// packed[d * stride] for d in [0, depth) from one token's query [Q, Kd].
template <typename T>
void pack_query(const T* query, const AccOf<T>* filter, const AxisShape& shape, int64_t stride,
                AccOf<T>* packed) {
  using Acc = AccOf<T>;
  for (int64_t r = 0; r < shape.num_queries; ++r) {
    const bool scaled = filter != nullptr && !shape.ranks_share_query();
    const Acc scale = scaled ? filter[r] : Acc{1};
    for (int64_t d = 0; d < shape.key_dim; ++d) {
      const Acc value = to_acc(query[r * shape.key_dim + d]);
      packed[(r * shape.key_dim + d) * stride] = scaled ? scale * value : value;
    }
  }
}

// scores[token][key] of one tile. queries [depth, kTileTokens]; panel [depth, kTileKeys].
template <typename Acc>
void score_tile(const Acc* __restrict queries, const Acc* __restrict panel, int64_t depth,
                Acc* __restrict scores, int64_t stride) {
  constexpr int kW = kLanes<Acc>;
  Vec<Acc> sum[kTileTokens][2] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const Vec<Acc> low = load(panel), high = load(panel + kW);
#pragma GCC unroll 12
    for (int i = 0; i < kTileTokens; ++i) {
      const Vec<Acc> query = broadcast(queries[i]);
      sum[i][0] += low * query;
      sum[i][1] += high * query;
    }
    panel += 2 * kW;
    queries += kTileTokens;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTileTokens; ++i) {
    store(scores + i * stride, sum[i][0]);
    store(scores + i * stride + kW, sum[i][1]);
  }
}

}  // namespace
}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
