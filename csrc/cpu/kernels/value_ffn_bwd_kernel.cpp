// value_ffn, backward, in two passes.
//
// The first goes by token, reads every retrieved row once and leaves the gradients of scores and
// pre_input and, for each entry (token, slot), h and da. The second goes by slot (row_groups.h): a
// row of a table's gradient is a weighted sum of rows of grad_out or pre_input, formed in registers
// and written once.
#include "../arena.h"
#include "../parallel.h"
#include "../row_groups.h"
#include "../slots.h"
#include "activation.h"
#include "kernels.h"
#include "rows.h"
#include "value_ffn_common.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

constexpr int64_t kBucketsPerTile = 8;
constexpr int64_t kPairsAhead = 3;

template <typename Acc>
struct Layout {
  Acc* grad_out;             // [T, groups, Dv], widened; unused where grad_out has type Acc
  Acc* pre_input;            // [T, Dp], likewise
  int64_t* slots;            // [T, S]
  int64_t* groups_of_slots;  // [T, S]
  Acc* hidden;               // h [T, S]; null without pre-values
  Acc* grad_pre;             // da [T, S]; likewise
  Acc* scratch;              // [workers, Dp + Dv]
  char* grouping;
};

bool has_pre_values(const ValueFfnParams& p) { return p.pre_value_dim > 0; }
bool wants_tables(const ValueFfnBwdParams& p) {
  return p.grad_values != nullptr || p.grad_pre_values != nullptr;
}

template <typename Acc>
Layout<Acc> lay_out(const ValueFfnBwdParams& p, const Executor& executor, Arena* arena) {
  const int64_t entries = p.num_tokens * p.num_selected;
  const int64_t pre_entries = has_pre_values(p) ? entries : 0;
  const bool widens = p.dtype != DType::kFloat32 && p.dtype != DType::kFloat64;
  Layout<Acc> layout;
  layout.grad_out = arena->take<Acc>(widens ? p.num_tokens * num_groups(p) * p.value_dim : 0);
  layout.pre_input = arena->take<Acc>(widens ? p.num_tokens * p.pre_value_dim : 0);
  layout.slots = arena->take<int64_t>(entries);
  layout.groups_of_slots = arena->take<int64_t>(entries);
  layout.hidden = arena->take<Acc>(pre_entries);
  layout.grad_pre =
      p.grad_a != nullptr ? static_cast<Acc*>(p.grad_a) : arena->take<Acc>(pre_entries);
  layout.scratch =
      arena->take<Acc>(worker_count(executor) * round_up(p.pre_value_dim + p.value_dim, 16));
  layout.grouping = arena->take<char>(static_cast<int64_t>(
      wants_tables(p) ? group_rows_workspace(entries, p.addressing.rows_in_memory(), executor)
                      : 0));
  return layout;
}

// Acc: float or double. Table: element type of the tables; T: of pre_input and out.
template <typename Table, typename T>
class TokenPass {
 public:
  using Acc = AccOf<Table>;

  TokenPass(const ValueFfnBwdParams& params, const Executor& executor, const Layout<Acc>& layout)
      : p_(params),
        executor_(executor),
        layout_(layout),
        value_scale_(load_scale<Acc>(params.value_scale)),
        pre_value_scale_(load_scale<Acc>(params.pre_value_scale)) {}

  StatusCode run() const {
    int64_t bad_tiles = 0;
    const int64_t tile_tokens = tokens_per_tile(p_);
    parallel_tiles(executor_, div_up(p_.num_tokens, tile_tokens),
                   [&](int64_t worker, int64_t tile) {
                     const int64_t first = tile * tile_tokens;
                     if (!token_tile(first, smaller(p_.num_tokens, first + tile_tokens), worker)) {
                       __atomic_fetch_add(&bad_tiles, 1, __ATOMIC_RELAXED);
                     }
                   });
    return bad_tiles == 0 ? StatusCode::kOk : StatusCode::kOutOfRange;
  }

 private:
  const Table* value_row(int64_t slot) const {
    return static_cast<const Table*>(p_.values) + slot * p_.value_dim;
  }
  const Table* pre_value_row(int64_t slot) const {
    return static_cast<const Table*>(p_.pre_values) + slot * p_.pre_value_dim;
  }
  bool wants_scores() const {
    return p_.grad_scores != nullptr || p_.grad_pre_input != nullptr || p_.grad_a != nullptr ||
           (p_.grad_pre_values != nullptr && has_pre_values(p_));
  }

  bool token_tile(int64_t first, int64_t last, int64_t worker) const {
    const int64_t selected = p_.num_selected;
    if (!resolve_slots(p_, first * selected, last * selected, layout_.slots + first * selected,
                       layout_.groups_of_slots + first * selected)) {
      return false;
    }
    const int64_t end = last * selected;
    for (int64_t ahead = 0; ahead < kSlotsPerBlock; ++ahead) {
      fetch_value_row(first * selected + ahead, end);
      fetch_pre_value_row(first * selected + ahead, end);
    }
    Acc* scratch = layout_.scratch + worker * round_up(p_.pre_value_dim + p_.value_dim, 16);
    const int64_t out_size = num_groups(p_) * p_.value_dim;
    for (int64_t token = first; token < last; ++token) {
      const T* grad_out = static_cast<const T*>(p_.grad_out) + token * out_size;
      const Acc* widened = widen_row(grad_out, layout_.grad_out, token, out_size);
      if (has_pre_values(p_)) {
        widen_row(static_cast<const T*>(p_.pre_input) + token * p_.pre_value_dim, layout_.pre_input,
                  token, p_.pre_value_dim);
      }
      if (selected == 0) set_zero(scratch, p_.pre_value_dim);
      for (int64_t s = 0; s < selected; s += kSlotsPerBlock) {
        const int64_t entry = token * selected + s;
        const int count = static_cast<int>(smaller(kSlotsPerBlock, selected - s));
        Acc grad_pre[kSlotsPerBlock];
        slot_gradients(entry, count, end, widened, grad_pre);
        if (p_.grad_pre_input != nullptr) add_pre_rows(entry, count, end, grad_pre, s > 0, scratch);
      }
      if (p_.grad_pre_input != nullptr) {
        round_to(static_cast<T*>(p_.grad_pre_input) + token * p_.pre_value_dim, scratch,
                 p_.pre_value_dim);
      }
    }
    return true;
  }

  void fetch_value_row(int64_t entry, int64_t end) const {
    if (entry >= end || !wants_scores() || layout_.slots[entry] < 0) return;
    prefetch_row(value_row(layout_.slots[entry]), p_.value_dim);
  }
  void fetch_pre_value_row(int64_t entry, int64_t end) const {
    if (entry >= end || p_.grad_pre_input == nullptr || layout_.slots[entry] < 0) return;
    prefetch_row(pre_value_row(layout_.slots[entry]), p_.pre_value_dim);
  }

  static const Acc* widen_row(const Acc* row, Acc*, int64_t, int64_t) { return row; }
  template <typename Narrow>
  static const Acc* widen_row(const Narrow* row, Acc* rows, int64_t token, int64_t size) {
    widen(rows + token * size, row, size);
    return rows + token * size;
  }

  // dw_c = <G_c, V_c>, dg_c = h dw_c, da = act'(a) sum_c g_c dw_c of the entries [first, first +
  // count), while the values that come next are fetched.
  void slot_gradients(int64_t first, int count, int64_t end, const Acc* grad_out,
                      Acc* grad_pre) const {
    Acc hidden[kSlotsPerBlock], derivative[kSlotsPerBlock];
    if (has_pre_values(p_)) {
      Acc a[kSlotsPerBlock] = {};
      __builtin_memcpy(a, static_cast<const Acc*>(p_.pre_activation) + first,
                       static_cast<size_t>(count) * sizeof(Acc));
      activate(p_.activation, a, count, hidden, derivative);
      __builtin_memcpy(layout_.hidden + first, hidden, static_cast<size_t>(count) * sizeof(Acc));
    }
    if (!wants_scores()) return;
    int places[kSlotsPerBlock];  // of the slots in memory
    const int num_places = places_in_memory(first, count, end, places, grad_pre);
    for (int i = 0; i < num_places;) {
      const int at_once = num_groups(p_) == 1 && i + kSlotsAtOnce <= num_places ? kSlotsAtOnce : 1;
      const Table* rows[kSlotsAtOnce];
      for (int k = 0; k < at_once; ++k) {
        const int64_t entry = first + places[i + k];
        rows[k] = value_row(layout_.slots[entry]);
        fetch_value_row(entry + kSlotsPerBlock, end);
      }
      const int64_t group = num_groups(p_) > 1 ? layout_.groups_of_slots[first + places[i]] : 0;
      Acc grad_weight[kMaxNumCores][kSlotsAtOnce] = {};
      row_products(grad_out + group * p_.value_dim, rows, at_once, grad_weight);
      for (int k = 0; k < at_once; ++k) {
        const int place = places[i + k];
        const Acc grad_hidden = score_gradients(first + place, k, grad_weight,
                                                has_pre_values(p_) ? hidden[place] : Acc{1});
        if (has_pre_values(p_)) grad_pre[place] = derivative[place] * grad_hidden;
      }
      i += at_once;
    }
    if (has_pre_values(p_)) {
      __builtin_memcpy(layout_.grad_pre + first, grad_pre,
                       static_cast<size_t>(count) * sizeof(Acc));
    }
  }

  // Which of the entries [first, first + count) have their slot in memory. The others' gradients
  // are zero.
  int places_in_memory(int64_t first, int count, int64_t end, int* places, Acc* grad_pre) const {
    int num_places = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t entry = first + i;
      if (layout_.slots[entry] >= 0) {
        places[num_places++] = i;
        continue;
      }
      fetch_value_row(entry + kSlotsPerBlock, end);
      grad_pre[i] = 0;
      if (p_.grad_scores != nullptr) {
        set_zero(static_cast<Acc*>(p_.grad_scores) + entry * p_.num_cores, p_.num_cores);
      }
    }
    return num_places;
  }

  // products[c][k] = <grad_out_c, rows[k]_c>
  void row_products(const Acc* grad_out, const Table* const* rows, int count,
                    Acc (*products)[kSlotsAtOnce]) const {
    const int64_t width = p_.value_dim / p_.num_cores;
    for (int c = 0; c < p_.num_cores; ++c) {
      if (count == kSlotsAtOnce) {
        dot_rows<kSlotsAtOnce>(grad_out + c * width, rows, c * width, width, products[c]);
      } else {
        dot_rows<1>(grad_out + c * width, rows, c * width, width, products[c]);
      }
    }
  }

  // Writes an entry's grad_scores and returns sum_c g_c dw_c, which without pre-values nobody
  // needs.
  Acc score_gradients(int64_t entry, int k, const Acc (*grad_weight)[kSlotsAtOnce],
                      Acc hidden) const {
    const Acc* scores =
        has_pre_values(p_) ? static_cast<const Acc*>(p_.scores) + entry * p_.num_cores : nullptr;
    Acc* grad_scores = static_cast<Acc*>(p_.grad_scores);
    Acc grad_hidden = 0;
    for (int c = 0; c < kMaxNumCores && c < p_.num_cores; ++c) {
      const Acc scaled = value_scale_ * grad_weight[c][k];
      if (grad_scores != nullptr) grad_scores[entry * p_.num_cores + c] = hidden * scaled;
      if (scores != nullptr) grad_hidden += scores[c] * scaled;
    }
    return grad_hidden;
  }

  // sum += da P, while the pre-values that come next are fetched.
  void add_pre_rows(int64_t first, int count, int64_t end, const Acc* grad_pre, bool accumulate,
                    Acc* sum) const {
    int64_t next = first + kSlotsPerBlock;
    const auto fetch_next = [&](int) { fetch_pre_value_row(next++, end); };
    Terms<Table> terms;
    for (int i = 0; i < count; ++i) {
      const int64_t slot = layout_.slots[first + i];
      if (slot >= 0) {
        terms.add(pre_value_scale_ * grad_pre[i], pre_value_row(slot));
      } else {
        fetch_next(i);
      }
    }
    weighted_sum(sum, p_.pre_value_dim, terms, nullptr, accumulate, fetch_next);
  }

  const ValueFfnBwdParams& p_;
  const Executor& executor_;
  const Layout<Acc>& layout_;
  const Acc value_scale_, pre_value_scale_;
};

// Grad: element type of the tables' gradients.
template <typename Grad>
class SlotPass {
 public:
  using Acc = AccOf<Grad>;

  // grad_out [T, groups, Dv] and pre_input [T, Dp] in the accumulation type.
  SlotPass(const ValueFfnBwdParams& params, const Executor& executor, const Layout<Acc>& layout,
           const Acc* grad_out, const Acc* pre_input)
      : p_(params),
        executor_(executor),
        layout_(layout),
        grad_out_(grad_out),
        pre_input_(pre_input) {}

  void run() const {
    const RowGroups groups =
        group_rows(layout_.slots, p_.num_tokens * p_.num_selected, p_.addressing.rows_in_memory(),
                   layout_.grouping, executor_);
    const int64_t tiles = div_up(groups.num_buckets, kBucketsPerTile);
    parallel_tiles(executor_, tiles, [&](int64_t worker, int64_t tile) {
      Acc* carry = layout_.scratch + worker * round_up(p_.pre_value_dim + p_.value_dim, 16);
      const int64_t first = tile * kBucketsPerTile;
      const int64_t last = smaller(groups.num_buckets, first + kBucketsPerTile);
      const uint64_t* tile_end = groups.pairs + groups.bucket_begin[last];
      for (int64_t bucket = first; bucket < last; ++bucket) {
        const uint64_t* pair = groups.pairs + groups.bucket_begin[bucket];
        const uint64_t* end = groups.pairs + groups.bucket_begin[bucket + 1];
        while (pair < end) {
          const uint64_t* run = pair;
          while (pair < end && *pair >> 32 == *run >> 32) {
            if (pair + kPairsAhead < tile_end) fetch(pair[kPairsAhead]);
            ++pair;
          }
          add_run(run, pair, carry);
        }
      }
    });
  }

 private:
  Grad* grad_value_row(int64_t slot) const {
    return static_cast<Grad*>(p_.grad_values) + slot * p_.value_dim;
  }
  Grad* grad_pre_value_row(int64_t slot) const {
    return static_cast<Grad*>(p_.grad_pre_values) + slot * p_.pre_value_dim;
  }
  int64_t slot_of(uint64_t pair) const { return layout_.slots[pair & 0xffffffffu]; }

  void fetch(uint64_t pair) const {
    const int64_t slot = slot_of(pair);
    if (p_.grad_values != nullptr) prefetch_row(grad_value_row(slot), p_.value_dim);
    if (p_.grad_pre_values != nullptr) prefetch_row(grad_pre_value_row(slot), p_.pre_value_dim);
  }

  // The gradient of the row that the entries of [run, end) share.
  void add_run(const uint64_t* run, const uint64_t* end, Acc* carry) const {
    const int64_t slot = slot_of(*run), width = p_.value_dim / p_.num_cores;
    if (p_.grad_values != nullptr) {
      for (int64_t c = 0; c < p_.num_cores; ++c) {
        add_terms(grad_value_row(slot) + c * width, width, run, end, carry,
                  [&](int64_t entry, Terms<Acc>* terms) {
                    const Acc score = static_cast<const Acc*>(p_.scores)[entry * p_.num_cores + c];
                    const Acc weight = has_pre_values(p_) ? layout_.hidden[entry] * score : score;
                    terms->add(weight, grad_out_of(entry) + c * width);
                  });
      }
    }
    if (p_.grad_pre_values != nullptr) {
      add_terms(grad_pre_value_row(slot), p_.pre_value_dim, run, end, carry,
                [&](int64_t entry, Terms<Acc>* terms) {
                  terms->add(layout_.grad_pre[entry],
                             pre_input_ + entry / p_.num_selected * p_.pre_value_dim);
                });
    }
  }

  const Acc* grad_out_of(int64_t entry) const {
    const int64_t token = entry / p_.num_selected, groups = num_groups(p_);
    const int64_t group = groups > 1 ? layout_.groups_of_slots[entry] : 0;
    return grad_out_ + (token * groups + group) * p_.value_dim;
  }

  template <typename MakeTerm>
  void add_terms(Grad* out, int64_t columns, const uint64_t* pair, const uint64_t* end, Acc* carry,
                 const MakeTerm& make_term) const {
    const Acc* carried = nullptr;
    for (;;) {
      Terms<Acc> terms;
      for (; pair < end && terms.count < kMaxTerms; ++pair) {
        make_term(static_cast<int64_t>(*pair & 0xffffffffu), &terms);
      }
      if (pair == end) {
        weighted_sum(out, columns, terms, carried, p_.accumulate);
        return;
      }
      weighted_sum(carry, columns, terms, carried, false);
      carried = carry;
    }
  }

  const ValueFfnBwdParams& p_;
  const Executor& executor_;
  const Layout<Acc>& layout_;
  const Acc* grad_out_;
  const Acc* pre_input_;
};

template <typename Table, typename T>
StatusCode backward(const ValueFfnBwdParams& params, const Executor& executor) {
  using Acc = AccOf<Table>;
  Arena arena(params.workspace);
  const Layout<Acc> layout = lay_out<Acc>(params, executor, &arena);
  const StatusCode code = TokenPass<Table, T>(params, executor, layout).run();
  if (code != StatusCode::kOk || !wants_tables(params)) return code;

  const bool widened = sizeof(T) < sizeof(Acc);
  const Acc* grad_out = widened ? layout.grad_out : static_cast<const Acc*>(params.grad_out);
  const Acc* pre_input = widened ? layout.pre_input : static_cast<const Acc*>(params.pre_input);
  with_type_accumulating_in<Acc>(params.grad_table_dtype, [&](auto type) {
    SlotPass<decltype(type)>(params, executor, layout, grad_out, pre_input).run();
  });
  return code;
}

}  // namespace

size_t value_ffn_bwd_workspace(const ValueFfnBwdParams& params, const Executor& executor) {
  Arena arena(nullptr);
  if (params.table_dtype == DType::kFloat64) {
    lay_out<double>(params, executor, &arena);
  } else {
    lay_out<float>(params, executor, &arena);
  }
  return arena.bytes();
}

StatusCode value_ffn_bwd(const ValueFfnBwdParams& params, const Executor& executor) {
  return with_type(params.table_dtype, [&](auto table) {
    using Table = decltype(table);
    return with_type_accumulating_in<AccOf<Table>>(
        params.dtype, [&](auto type) { return backward<Table, decltype(type)>(params, executor); });
  });
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
