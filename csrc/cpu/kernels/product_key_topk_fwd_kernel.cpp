// product_key_topk, forward.
//
// A tile of tokens of one head at a time: the filter scores of all keys go to a buffer that stays
// in L2 and are reduced to the m best of each token; the R scores of those are then computed
// exactly, and the grid of m * m candidates is scored and reduced the same way. With few tokens
// packing the keys would cost more than the product: they are scored row by row instead.
#include <algorithm>

#include "../arena.h"
#include "../parallel.h"
#include "axis_scores.h"
#include "kernels.h"
#include "rows.h"
#include "select_topk.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

constexpr int64_t kTokenTile = 24;
static_assert(kTokenTile % kTileTokens == 0);
constexpr int64_t kMaxUnpackedTokens = 8;
constexpr int64_t kKeysPerTile = 64;  // of the unpacked path
constexpr int64_t kKeysAhead = 3;

template <typename Acc>
struct Scratch {  // of one worker
  Acc* queries;   // [kTokenTile / kTileTokens, depth, kTileTokens]
  Acc* scores;    // [kTokenTile, padded_keys]
  Acc* query;     // [Q, Kd]; of every token where keys are not packed
  Acc* grid;      // [m * m], padded
  Candidate<Acc>* candidates;
};

template <typename Acc>
struct Layout {
  int64_t padded_keys;
  Acc* panels;      // packed: [H, 2, panels, depth, kTileKeys]
  Acc* all_scores;  // unpacked: [H, 2, T, padded_keys]
  Acc* scratch;
  int64_t scratch_bytes;
};

bool packs_keys(const ProductKeyTopkParams& p) { return p.num_tokens > kMaxUnpackedTokens; }

AxisShape axis_shape(const ProductKeyTopkParams& p) {
  return {p.num_keys, p.key_dim, p.num_queries, p.tucker_rank};
}

template <typename Acc>
Scratch<Acc> lay_out_scratch(const ProductKeyTopkParams& p, int64_t padded_keys, Arena* arena) {
  const int64_t grid = round_up(p.axis_topk * p.axis_topk, kLanes<Acc>) + kLanes<Acc>;
  Scratch<Acc> scratch;
  scratch.queries = arena->take<Acc>(packs_keys(p) ? kTokenTile * axis_shape(p).depth() : 0);
  scratch.scores = arena->take<Acc>(packs_keys(p) ? kTokenTile * padded_keys : 0);
  scratch.query = arena->take<Acc>((packs_keys(p) ? 1 : p.num_tokens) * p.num_queries * p.key_dim);
  scratch.grid = arena->take<Acc>(grid);
  scratch.candidates = arena->take<Candidate<Acc>>(larger(padded_keys, grid) + kLanes<Acc>);
  return scratch;
}

template <typename Acc>
Layout<Acc> lay_out(const ProductKeyTopkParams& p, const Executor& executor, Arena* arena) {
  const bool packed = packs_keys(p);
  const int64_t axes = 2 * p.num_heads;
  Layout<Acc> layout;
  layout.padded_keys = round_up(p.num_keys, kTileKeys<Acc>);
  layout.panels = arena->take<Acc>(packed ? axes * layout.padded_keys * axis_shape(p).depth() : 0);
  layout.all_scores = arena->take<Acc>(packed ? 0 : axes * p.num_tokens * layout.padded_keys);
  Arena measure(nullptr);
  lay_out_scratch<Acc>(p, layout.padded_keys, &measure);
  layout.scratch_bytes = static_cast<int64_t>(measure.bytes());
  layout.scratch =
      reinterpret_cast<Acc*>(arena->take<char>(layout.scratch_bytes * worker_count(executor)));
  return layout;
}

template <typename T>
class Forward {
 public:
  using Acc = AccOf<T>;

  Forward(const ProductKeyTopkParams& params, const Executor& executor)
      : p_(params), executor_(executor), shape_(axis_shape(params)) {
    Arena arena(params.workspace);
    layout_ = lay_out<Acc>(params, executor, &arena);
  }

  void run() const {
    if (packs_keys(p_)) {
      pack_all_keys();
      const int64_t token_tiles = div_up(p_.num_tokens, kTokenTile);
      parallel_tiles(executor_, p_.num_heads * token_tiles, [&](int64_t worker, int64_t tile) {
        score_and_select(tile / token_tiles, tile % token_tiles * kTokenTile, scratch_of(worker));
      });
    } else {
      score_all_keys();
      parallel_tiles(executor_, p_.num_heads * p_.num_tokens, [&](int64_t worker, int64_t tile) {
        const int64_t head = tile / p_.num_tokens, token = tile % p_.num_tokens;
        const Scratch<Acc> scratch = scratch_of(worker);
        for (int side = 0; side < 2; ++side) {
          select_axis(token, head, side,
                      layout_.all_scores +
                          ((head * 2 + side) * p_.num_tokens + token) * layout_.padded_keys,
                      scratch);
        }
        select_grid(token, head, scratch);
      });
    }
  }

 private:
  Scratch<Acc> scratch_of(int64_t worker) const {
    Arena arena(reinterpret_cast<char*>(layout_.scratch) + worker * layout_.scratch_bytes);
    return lay_out_scratch<Acc>(p_, layout_.padded_keys, &arena);
  }

  const T* query_of(int64_t token, int64_t head, int64_t side) const {
    return static_cast<const T*>(p_.query) +
           ((token * 2 + side) * p_.num_heads + head) * p_.num_queries * p_.key_dim;
  }
  const T* keys_of(int64_t head, int64_t side) const {
    return static_cast<const T*>(p_.keys) +
           (head * 2 + side) * p_.tucker_rank * p_.num_keys * p_.key_dim;
  }
  // u or t of a head; null in additive mode.
  const Acc* filter_of(int64_t head, int64_t side) const {
    if (p_.mode == ScoreMode::kAdditive) return nullptr;
    return static_cast<const Acc*>(side == 0 ? p_.u : p_.t) + head * p_.tucker_rank;
  }
  int32_t* axis_indices_of(int64_t token, int64_t head, int64_t side) const {
    return p_.axis_indices + ((token * p_.num_heads + head) * 2 + side) * p_.axis_topk;
  }
  Acc* axis_scores_of(int64_t token, int64_t head, int64_t side) const {
    return static_cast<Acc*>(p_.axis_scores) +
           ((token * p_.num_heads + head) * 2 + side) * p_.tucker_rank * p_.axis_topk;
  }

  void pack_all_keys() const {
    const int64_t panels = layout_.padded_keys / kTileKeys<Acc>;
    parallel_tiles(executor_, 2 * p_.num_heads * panels, [&](int64_t, int64_t tile) {
      const int64_t head = tile / panels / 2, side = tile / panels % 2;
      pack_keys(keys_of(head, side), filter_of(head, side), shape_, tile % panels * kTileKeys<Acc>,
                layout_.panels + tile * shape_.depth() * kTileKeys<Acc>);
    });
  }

  void score_and_select(int64_t head, int64_t first_token, const Scratch<Acc>& scratch) const {
    const int64_t depth = shape_.depth();
    const int64_t stride = layout_.padded_keys;
    const int64_t count = smaller(kTokenTile, p_.num_tokens - first_token);
    const int64_t tiles = div_up(count, kTileTokens);
    for (int side = 0; side < 2; ++side) {
      if (count < tiles * kTileTokens) set_zero(scratch.queries, tiles * kTileTokens * depth);
      for (int64_t i = 0; i < count; ++i) {
        pack_query(query_of(first_token + i, head, side), filter_of(head, side), shape_,
                   kTileTokens,
                   scratch.queries + i / kTileTokens * kTileTokens * depth + i % kTileTokens);
      }
      const Acc* panel = layout_.panels + (head * 2 + side) * stride * depth;
      for (int64_t key = 0; key < stride; key += kTileKeys<Acc>) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          score_tile(scratch.queries + tile * kTileTokens * depth, panel + key * depth, depth,
                     scratch.scores + tile * kTileTokens * stride + key, stride);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        select_axis(first_token + i, head, side, scratch.scores + i * stride, scratch);
      }
    }
    for (int64_t i = 0; i < count; ++i) select_grid(first_token + i, head, scratch);
  }

  // The path for few tokens: keys are read once, where they are.
  void score_all_keys() const {
    const int64_t blocks = div_up(p_.num_keys, kKeysPerTile);
    parallel_tiles(executor_, 2 * p_.num_heads * blocks, [&](int64_t worker, int64_t tile) {
      const int64_t axis = tile / blocks, first = tile % blocks * kKeysPerTile;
      const int64_t last = smaller(p_.num_keys, first + kKeysPerTile);
      const T* keys = keys_of(axis / 2, axis % 2);
      const Acc* filter = filter_of(axis / 2, axis % 2);
      const int64_t query_size = p_.num_queries * p_.key_dim;
      Acc* queries = scratch_of(worker).query;
      for (int64_t token = 0; token < p_.num_tokens; ++token) {
        widen(queries + token * query_size, query_of(token, axis / 2, axis % 2), query_size);
      }
      Acc* scores = layout_.all_scores + axis * p_.num_tokens * layout_.padded_keys;
      for (int64_t key = first; key < last; ++key) {
        Acc sums[kMaxUnpackedTokens] = {};
        for (int64_t r = 0; r < p_.tucker_rank; ++r) {
          Acc rank_scores[kMaxUnpackedTokens];
          score_key(queries + (p_.num_queries == 1 ? 0 : r * p_.key_dim), query_size,
                    keys + (r * p_.num_keys + key) * p_.key_dim, rank_scores);
          const Acc weight = filter == nullptr ? Acc{1} : filter[r];
          for (int64_t token = 0; token < p_.num_tokens; ++token) {
            sums[token] += weight * rank_scores[token];
          }
        }
        for (int64_t token = 0; token < p_.num_tokens; ++token) {
          scores[token * layout_.padded_keys + key] = sums[token];
        }
      }
    });
  }

  // <query, key> for every token.
  void score_key(const Acc* queries, int64_t query_size, const T* key, Acc* scores) const {
    int64_t token = 0;
    for (; token + 4 <= p_.num_tokens; token += 4) {
      dot_four(queries + token * query_size, query_size, key, p_.key_dim, scores + token);
    }
    for (; token < p_.num_tokens; ++token) {
      scores[token] = dot(queries + token * query_size, key, p_.key_dim);
    }
  }

  // The m best keys of one side and their R scores.
  void select_axis(int64_t token, int64_t head, int64_t side, Acc* scores,
                   const Scratch<Acc>& scratch) const {
    const int64_t m = p_.axis_topk;
    for (int64_t i = p_.num_keys; i < layout_.padded_keys; ++i) scores[i] = kMinusInfinity<Acc>;
    int32_t* kept = axis_indices_of(token, head, side);
    select_topk(scores, p_.num_keys, m, scratch.candidates, kept);
    std::sort(kept, kept + m);

    widen(scratch.query, query_of(token, head, side), p_.num_queries * p_.key_dim);
    Acc* exact = axis_scores_of(token, head, side);
    const T* keys = keys_of(head, side);
    for (int64_t r = 0; r < p_.tucker_rank; ++r) {
      const Acc* query = scratch.query + (p_.num_queries == 1 ? 0 : r * p_.key_dim);
      const T* rank_keys = keys + r * p_.num_keys * p_.key_dim;
      for (int64_t i = 0; i < m; ++i) {
        // The kept keys are scattered over more than L2 holds.
        prefetch_row(rank_keys + kept[smaller(m - 1, i + kKeysAhead)] * p_.key_dim, p_.key_dim);
        exact[r * m + i] = dot(query, rank_keys + kept[i] * p_.key_dim, p_.key_dim);
      }
    }
  }

  // The kept keys are in ascending order, so the grid's flat position breaks ties as row * n + col
  // does.
  void select_grid(int64_t token, int64_t head, const Scratch<Acc>& scratch) const {
    const int32_t m = p_.axis_topk, rank = p_.tucker_rank;
    const int32_t* rows = axis_indices_of(token, head, 0);
    const int32_t* cols = axis_indices_of(token, head, 1);
    int32_t best[kMaxTopk];
    score_grid(token, head, scratch.grid);
    select_topk(scratch.grid, int64_t{m} * m, p_.topk, scratch.candidates, best);

    const int64_t out = (token * p_.num_heads + head) * p_.topk;
    const Acc* s_row = axis_scores_of(token, head, 0);
    const Acc* s_col = axis_scores_of(token, head, 1);
    for (int32_t k = 0; k < p_.topk; ++k) {
      const int32_t i = best[k] / m, j = best[k] % m;
      p_.indices[out + k] = int64_t{rows[i]} * p_.num_keys + cols[j];
      p_.grid_positions[out + k] = static_cast<int16_t>(best[k]);
      Acc* scores = static_cast<Acc*>(p_.scores) + (out + k) * p_.num_cores;
      if (p_.mode == ScoreMode::kAdditive) {
        scores[0] = s_row[i] + s_col[j];
        continue;
      }
      for (int32_t c = 0; c < p_.num_cores; ++c) {
        const Acc* core =
            static_cast<const Acc*>(p_.core) + (c * p_.num_heads + head) * rank * rank;
        Acc score = 0;
        for (int32_t r = 0; r < rank; ++r) {
          for (int32_t s = 0; s < rank; ++s) {
            score += s_row[r * m + i] * core[r * rank + s] * s_col[s * m + j];
          }
        }
        scores[c] = score;
      }
    }
  }

  // grid[i * m + j] = rank of the pair (i, j), padded with -inf.
  void score_grid(int64_t token, int64_t head, Acc* grid) const {
    constexpr int kW = kLanes<Acc>;
    const int32_t m = p_.axis_topk, rank = p_.tucker_rank;
    const Acc* s_row = axis_scores_of(token, head, 0);
    const Acc* s_col = axis_scores_of(token, head, 1);
    Acc col[kMaxTuckerRank][kMaxAxisTopk + kW] = {};
    for (int32_t s = 0; s < rank; ++s) {
      std::copy_n(s_col + s * m, m, col[s]);
    }
    Acc core_sum[kMaxTuckerRank][kMaxTuckerRank] = {};
    if (p_.mode == ScoreMode::kTucker) sum_cores(head, core_sum);
    for (int32_t i = 0; i < m; ++i) {
      Acc row[kMaxTuckerRank] = {};
      for (int32_t r = 0; r < rank; ++r) {
        for (int32_t s = 0; s < rank; ++s) row[s] += s_row[r * m + i] * core_sum[r][s];
      }
      // The last vector of a row reaches into the next, which overwrites it, and into the padding.
      for (int32_t b = 0; b < m; b += kW) {
        Vec<Acc> score;
        if (p_.mode == ScoreMode::kAdditive) {
          score = load(col[0] + b) + s_row[i];
        } else {
          score = load(col[0] + b) * row[0];
          for (int32_t s = 1; s < rank; ++s) score += load(col[s] + b) * row[s];
        }
        store(grid + i * m + b, score);
      }
    }
    for (int64_t i = int64_t{m} * m; i < round_up(int64_t{m} * m, kW); ++i) {
      grid[i] = kMinusInfinity<Acc>;
    }
  }

  void sum_cores(int64_t head, Acc (&sum)[kMaxTuckerRank][kMaxTuckerRank]) const {
    const int32_t rank = p_.tucker_rank;
    for (int32_t c = 0; c < p_.num_cores; ++c) {
      const Acc* core = static_cast<const Acc*>(p_.core) + (c * p_.num_heads + head) * rank * rank;
      for (int32_t r = 0; r < rank; ++r) {
        for (int32_t s = 0; s < rank; ++s) sum[r][s] += core[r * rank + s];
      }
    }
  }

  const ProductKeyTopkParams& p_;
  const Executor& executor_;
  const AxisShape shape_;
  Layout<Acc> layout_;
};

}  // namespace

size_t product_key_topk_fwd_workspace(const ProductKeyTopkParams& params,
                                      const Executor& executor) {
  Arena arena(nullptr);
  if (params.dtype == DType::kFloat64) {
    lay_out<double>(params, executor, &arena);
  } else {
    lay_out<float>(params, executor, &arena);
  }
  return arena.bytes();
}

void product_key_topk_fwd(const ProductKeyTopkParams& params, const Executor& executor) {
  with_type(params.dtype, [&](auto type) { Forward<decltype(type)>(params, executor).run(); });
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
