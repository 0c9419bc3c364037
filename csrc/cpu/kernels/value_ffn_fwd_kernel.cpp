// value_ffn, forward: bound by the reads of rows, each of which is read once.
#include "../arena.h"
#include "../parallel.h"
#include "../slots.h"
#include "activation.h"
#include "kernels.h"
#include "rows.h"
#include "value_ffn_common.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

template <typename Acc>
struct Scratch {    // of one worker
  int64_t* slots;   // [tokens_per_tile, S]
  int64_t* groups;  // [tokens_per_tile, S]
  Acc* pre_input;   // [Dp]
  Acc* out;         // [groups, Dv]
};

template <typename Acc>
Scratch<Acc> lay_out(const ValueFfnParams& p, Arena* arena) {
  const int64_t entries = tokens_per_tile(p) * p.num_selected;
  Scratch<Acc> scratch;
  scratch.slots = arena->take<int64_t>(entries);
  scratch.groups = arena->take<int64_t>(entries);
  scratch.pre_input = arena->take<Acc>(p.pre_value_dim);
  scratch.out = arena->take<Acc>(num_groups(p) * p.value_dim);
  return scratch;
}

template <typename Acc>
size_t scratch_bytes(const ValueFfnParams& p) {
  Arena arena(nullptr);
  lay_out<Acc>(p, &arena);
  return arena.bytes();
}

// Table: element type of the tables; T: of pre_input and out.
template <typename Table, typename T>
class Forward {
 public:
  using Acc = AccOf<Table>;

  Forward(const ValueFfnParams& params, const Executor& executor)
      : p_(params), executor_(executor), scratch_bytes_(scratch_bytes<Acc>(params)) {}

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

  bool token_tile(int64_t first, int64_t last, int64_t worker) const {
    Arena arena(static_cast<char*>(p_.workspace) + worker * scratch_bytes_);
    const Scratch<Acc> scratch = lay_out<Acc>(p_, &arena);
    const int64_t selected = p_.num_selected, entries = (last - first) * selected;
    if (!resolve_slots(p_, first * selected, last * selected, scratch.slots, scratch.groups)) {
      return false;
    }
    const auto fetch = [&](int64_t entry) {
      if (entry >= entries) return;
      prefetch_row(pre_value_row(scratch.slots[entry]), p_.pre_value_dim);
      prefetch_row(value_row(scratch.slots[entry]), p_.value_dim);
    };
    for (int64_t entry = 0; entry < kSlotsAhead; ++entry) fetch(entry);

    const int64_t out_size = num_groups(p_) * p_.value_dim;
    for (int64_t token = first; token < last; ++token) {
      if (p_.pre_value_dim > 0) {
        widen(scratch.pre_input, static_cast<const T*>(p_.pre_input) + token * p_.pre_value_dim,
              p_.pre_value_dim);
      }
      set_zero(scratch.out, out_size);
      for (int64_t s = 0; s < selected; ++s) {
        const int64_t entry = (token - first) * selected + s;
        fetch(entry + kSlotsAhead);
        add_slot(token * selected + s, scratch.slots[entry],
                 num_groups(p_) > 1 ? scratch.groups[entry] : 0, scratch);
      }
      round_to(static_cast<T*>(p_.out) + token * out_size, scratch.out, out_size);
    }
    return true;
  }

  void add_slot(int64_t entry, int64_t slot, int64_t group, const Scratch<Acc>& scratch) const {
    Acc hidden = 1;
    if (p_.pre_value_dim > 0) {
      const Acc a = dot(scratch.pre_input, pre_value_row(slot), p_.pre_value_dim);
      static_cast<Acc*>(p_.pre_activation)[entry] = a;
      hidden = activate(p_.activation, a);
    }
    const Acc* scores = static_cast<const Acc*>(p_.scores) + entry * p_.num_cores;
    const int64_t width = p_.value_dim / p_.num_cores;
    Acc* out = scratch.out + group * p_.value_dim;
    for (int64_t c = 0; c < p_.num_cores; ++c) {
      add_scaled(out + c * width, hidden * scores[c], value_row(slot) + c * width, width);
    }
  }

  const ValueFfnParams& p_;
  const Executor& executor_;
  const size_t scratch_bytes_;
};

}  // namespace

size_t value_ffn_fwd_workspace(const ValueFfnParams& params, const Executor& executor) {
  const size_t bytes = params.table_dtype == DType::kFloat64 ? scratch_bytes<double>(params)
                                                             : scratch_bytes<float>(params);
  return bytes * static_cast<size_t>(worker_count(executor));
}

StatusCode value_ffn_fwd(const ValueFfnParams& params, const Executor& executor) {
  const DType dtype = params.pre_value_dim > 0 ? params.dtype : params.table_dtype;
  return with_type(params.table_dtype, [&](auto table) {
    using Table = decltype(table);
    return with_type_accumulating_in<AccOf<Table>>(
        dtype, [&](auto type) { return Forward<Table, decltype(type)>(params, executor).run(); });
  });
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
