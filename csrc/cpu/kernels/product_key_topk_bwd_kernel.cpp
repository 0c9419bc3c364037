// product_key_topk, backward.
//
// dS has m * R entries a token and side; it is kept at the kept keys only. The query's gradient
// sums over a token's keys; the keys' gradient sums over a key's tokens, each key row having one
// owner (row_groups.h).
#include "../arena.h"
#include "../parallel.h"
#include "../row_groups.h"
#include "kernels.h"
#include "rows.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

constexpr int64_t kTokenTile = 32;
constexpr int64_t kBucketsPerTile = 8;

template <typename Acc>
struct Layout {
  Acc* grad_axis;       // dS [T, H, 2, R, m]
  int64_t* rows;        // [T, H, 2, m], key rows of the flattened [H, 2, n]
  double* core_pieces;  // [token tiles, C, H, R, R]
  Acc* carries;         // [workers, Kd]
  char* groups;
};

template <typename Acc>
Layout<Acc> lay_out(const ProductKeyTopkBwdParams& p, const Executor& executor, Arena* arena) {
  const int64_t entries = p.num_tokens * p.num_heads * 2 * p.axis_topk;
  Layout<Acc> layout;
  layout.grad_axis = arena->take<Acc>(entries * p.tucker_rank);
  layout.rows = arena->take<int64_t>(entries);
  layout.core_pieces = arena->take<double>(div_up(p.num_tokens, kTokenTile) * p.num_cores *
                                           p.num_heads * p.tucker_rank * p.tucker_rank);
  layout.carries = arena->take<Acc>(worker_count(executor) * p.key_dim);
  layout.groups = arena->take<char>(
      static_cast<int64_t>(group_rows_workspace(entries, 2 * p.num_heads * p.num_keys, executor)));
  return layout;
}

template <typename T>
class Backward {
 public:
  using Acc = AccOf<T>;

  Backward(const ProductKeyTopkBwdParams& params, const Executor& executor)
      : p_(params), executor_(executor) {
    Arena arena(params.workspace);
    layout_ = lay_out<Acc>(params, executor, &arena);
  }

  StatusCode run() const {
    int64_t bad_tiles = 0;
    const int64_t tiles = div_up(p_.num_tokens, kTokenTile);
    parallel_tiles(executor_, tiles, [&](int64_t, int64_t tile) {
      if (!token_tile(tile)) __atomic_fetch_add(&bad_tiles, 1, __ATOMIC_RELAXED);
    });
    if (bad_tiles != 0) return StatusCode::kOutOfRange;
    if (p_.grad_core != nullptr) sum_core_pieces(tiles);
    if (p_.grad_keys != nullptr) grad_keys();
    return StatusCode::kOk;
  }

 private:
  int64_t axis_of(int64_t token, int64_t head, int64_t side) const {
    return (token * p_.num_heads + head) * 2 + side;
  }
  const T* keys_of(int64_t head, int64_t side) const {
    return static_cast<const T*>(p_.keys) +
           (head * 2 + side) * p_.tucker_rank * p_.num_keys * p_.key_dim;
  }
  int64_t query_offset(int64_t token, int64_t head, int64_t side) const {
    return ((token * 2 + side) * p_.num_heads + head) * p_.num_queries * p_.key_dim;
  }

  // Everything but the keys' gradient of one tile of tokens. False where an index is out of range.
  bool token_tile(int64_t tile) const {
    const int64_t core_size =
        int64_t{p_.num_cores} * p_.num_heads * p_.tucker_rank * p_.tucker_rank;
    double* core_piece = layout_.core_pieces + tile * core_size;
    set_zero(core_piece, core_size);
    const int64_t last = smaller(p_.num_tokens, (tile + 1) * kTokenTile);
    for (int64_t token = tile * kTokenTile; token < last; ++token) {
      for (int64_t head = 0; head < p_.num_heads; ++head) {
        if (!key_rows(token, head) || !grad_axis(token, head, core_piece)) return false;
        if (p_.grad_query == nullptr) continue;
        for (int side = 0; side < 2; ++side) grad_query(token, head, side);
      }
    }
    return true;
  }

  bool key_rows(int64_t token, int64_t head) const {
    for (int side = 0; side < 2; ++side) {
      const int64_t first = axis_of(token, head, side) * p_.axis_topk;
      for (int64_t i = first; i < first + p_.axis_topk; ++i) {
        const int64_t key = p_.axis_indices[i];
        if (key < 0 || key >= p_.num_keys) return false;
        layout_.rows[i] = (head * 2 + side) * p_.num_keys + key;
      }
    }
    return true;
  }

  bool grad_axis(int64_t token, int64_t head, double* core_piece) const {
    const int32_t m = p_.axis_topk, rank = p_.tucker_rank;
    const int64_t per_side = int64_t{rank} * m;
    const Acc* s_row = static_cast<const Acc*>(p_.axis_scores) + axis_of(token, head, 0) * per_side;
    const Acc* s_col = s_row + per_side;
    Acc* ds_row = layout_.grad_axis + axis_of(token, head, 0) * per_side;
    Acc* ds_col = ds_row + per_side;
    set_zero(ds_row, 2 * per_side);
    Acc grad_core[kMaxNumCores][kMaxTuckerRank][kMaxTuckerRank] = {};

    const int64_t first = (token * p_.num_heads + head) * p_.topk;
    for (int32_t k = 0; k < p_.topk; ++k) {
      const int32_t position = p_.grid_positions[first + k];
      if (position < 0 || position >= m * m) return false;
      const int32_t i = position / m, j = position % m;
      const Acc* grad = static_cast<const Acc*>(p_.grad_scores) + (first + k) * p_.num_cores;
      if (p_.mode == ScoreMode::kAdditive) {
        ds_row[i] += grad[0];
        ds_col[j] += grad[0];
        continue;
      }
      for (int32_t r = 0; r < rank; ++r) {
        for (int32_t s = 0; s < rank; ++s) {
          Acc mixed = 0;
          for (int32_t c = 0; c < p_.num_cores; ++c) {
            mixed += grad[c] * static_cast<const Acc*>(p_.core)[core_offset(c, head, r, s)];
            grad_core[c][r][s] += grad[c] * s_row[r * m + i] * s_col[s * m + j];
          }
          ds_row[r * m + i] += mixed * s_col[s * m + j];
          ds_col[s * m + j] += mixed * s_row[r * m + i];
        }
      }
    }
    for (int32_t c = 0; c < p_.num_cores; ++c) {
      for (int32_t r = 0; r < rank; ++r) {
        for (int32_t s = 0; s < rank; ++s) {
          core_piece[core_offset(c, head, r, s)] += static_cast<double>(grad_core[c][r][s]);
        }
      }
    }
    return true;
  }

  int64_t core_offset(int64_t c, int64_t head, int64_t r, int64_t s) const {
    return ((c * p_.num_heads + head) * p_.tucker_rank + r) * p_.tucker_rank + s;
  }

  // dq_r = sum_i dS[r,i] K[r,i], over the ranks too where they share the query.
  void grad_query(int64_t token, int64_t head, int64_t side) const {
    static_assert(kMaxTuckerRank * kMaxAxisTopk <= kMaxTerms);
    const int64_t m = p_.axis_topk;
    const int32_t* kept = p_.axis_indices + axis_of(token, head, side) * m;
    const Acc* ds = layout_.grad_axis + axis_of(token, head, side) * p_.tucker_rank * m;
    const T* keys = keys_of(head, side);
    T* out = static_cast<T*>(p_.grad_query) + query_offset(token, head, side);
    const int32_t ranks_per_query = p_.tucker_rank / p_.num_queries;
    for (int32_t query = 0; query < p_.num_queries; ++query) {
      Terms<T> terms;
      for (int32_t r = query * ranks_per_query; r < (query + 1) * ranks_per_query; ++r) {
        for (int64_t i = 0; i < m; ++i) {
          terms.add(ds[r * m + i], keys + (r * p_.num_keys + kept[i]) * p_.key_dim);
        }
      }
      weighted_sum(out + query * p_.key_dim, p_.key_dim, terms, static_cast<const Acc*>(nullptr),
                   false);
    }
  }

  void sum_core_pieces(int64_t tiles) const {
    const int64_t size = int64_t{p_.num_cores} * p_.num_heads * p_.tucker_rank * p_.tucker_rank;
    for (int64_t i = 0; i < size; ++i) {
      double sum = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) sum += layout_.core_pieces[tile * size + i];
      static_cast<Acc*>(p_.grad_core)[i] = static_cast<Acc>(sum);
    }
  }

  void grad_keys() const {
    const int64_t num_rows = 2 * p_.num_heads * p_.num_keys;
    const int64_t entries = p_.num_tokens * p_.num_heads * 2 * p_.axis_topk;
    const RowGroups groups = group_rows(layout_.rows, entries, num_rows, layout_.groups, executor_);
    const int64_t tiles = div_up(groups.num_buckets, kBucketsPerTile);
    parallel_tiles(executor_, tiles, [&](int64_t worker, int64_t tile) {
      const int64_t last = smaller(groups.num_buckets, (tile + 1) * kBucketsPerTile);
      for (int64_t bucket = tile * kBucketsPerTile; bucket < last; ++bucket) {
        const uint64_t* pair = groups.pairs + groups.bucket_begin[bucket];
        const uint64_t* end = groups.pairs + groups.bucket_begin[bucket + 1];
        const int64_t first_row = bucket << groups.shift;
        const int64_t last_row = smaller(num_rows, first_row + (int64_t{1} << groups.shift));
        for (int64_t row = first_row; row < last_row; ++row) {
          const uint64_t* run = pair;
          while (pair < end && static_cast<int64_t>(*pair >> 32) == row - first_row) ++pair;
          grad_key(row, run, pair, layout_.carries + worker * p_.key_dim);
        }
      }
    });
  }

  // dK[r,i] = sum over the tokens that kept key i of dS[r,i] q_r; zero where none did.
  void grad_key(int64_t row, const uint64_t* run, const uint64_t* end, Acc* carry) const {
    const int64_t axis = row / p_.num_keys, key = row % p_.num_keys;
    const int64_t head = axis / 2, side = axis % 2, m = p_.axis_topk;
    for (int64_t r = 0; r < p_.tucker_rank; ++r) {
      T* out = static_cast<T*>(p_.grad_keys) +
               ((axis * p_.tucker_rank + r) * p_.num_keys + key) * p_.key_dim;
      const T* queries =
          static_cast<const T*>(p_.query) + (p_.num_queries == 1 ? 0 : r) * p_.key_dim;
      const Acc* carried = nullptr;
      const uint64_t* pair = run;
      do {
        Terms<T> terms;
        for (; pair < end && terms.count < kMaxTerms; ++pair) {
          const int64_t entry = static_cast<int64_t>(*pair & 0xffffffffu);
          const int64_t token = entry / (m * 2 * p_.num_heads);
          terms.add(
              layout_.grad_axis[(axis_of(token, head, side) * p_.tucker_rank + r) * m + entry % m],
              queries + query_offset(token, head, side));
        }
        if (pair < end) {
          weighted_sum(carry, p_.key_dim, terms, carried, false);
          carried = carry;
        } else {
          weighted_sum(out, p_.key_dim, terms, carried, false);
        }
      } while (pair < end);
    }
  }

  const ProductKeyTopkBwdParams& p_;
  const Executor& executor_;
  Layout<Acc> layout_;
};

}  // namespace

size_t product_key_topk_bwd_workspace(const ProductKeyTopkBwdParams& params,
                                      const Executor& executor) {
  Arena arena(nullptr);
  if (params.dtype == DType::kFloat64) {
    lay_out<double>(params, executor, &arena);
  } else {
    lay_out<float>(params, executor, &arena);
  }
  return arena.bytes();
}

StatusCode product_key_topk_bwd(const ProductKeyTopkBwdParams& params, const Executor& executor) {
  return with_type(params.dtype,
                   [&](auto type) { return Backward<decltype(type)>(params, executor).run(); });
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
