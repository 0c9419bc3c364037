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
      : p_(params),
        executor_(executor),
        scratch_bytes_(scratch_bytes<Acc>(params)),
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
  void fetch_value_row(int64_t slot) const {
    if (slot >= 0) prefetch_row(value_row(slot), p_.value_dim);
  }
  void fetch_pre_value_row(int64_t slot) const {
    if (slot >= 0) prefetch_row(pre_value_row(slot), p_.pre_value_dim);
  }

  bool token_tile(int64_t first, int64_t last, int64_t worker) const {
    Arena arena(static_cast<char*>(p_.workspace) + worker * scratch_bytes_);
    const Scratch<Acc> scratch = lay_out<Acc>(p_, &arena);
    const int64_t selected = p_.num_selected, entries = (last - first) * selected;
    if (!resolve_slots(p_, first * selected, last * selected, scratch.slots, scratch.groups)) {
      return false;
    }
    const int64_t* end = scratch.slots + entries;
    for (int64_t i = 0; i < smaller(entries, kSlotsPerBlock); ++i) {
      fetch_pre_value_row(scratch.slots[i]);
      fetch_value_row(scratch.slots[i]);
    }
    const int64_t out_size = num_groups(p_) * p_.value_dim;
    for (int64_t token = first; token < last; ++token) {
      if (p_.pre_value_dim > 0) {
        widen(scratch.pre_input, static_cast<const T*>(p_.pre_input) + token * p_.pre_value_dim,
              p_.pre_value_dim);
      }
      if (num_groups(p_) > 1 || selected == 0) set_zero(scratch.out, out_size);
      for (int64_t s = 0; s < selected; s += kSlotsPerBlock) {
        const int64_t begin = (token - first) * selected + s;
        const Block block = {token * selected + s,
                             static_cast<int>(smaller(kSlotsPerBlock, selected - s)),
                             scratch.slots + begin,
                             scratch.groups + begin,
                             end,
                             num_groups(p_) > 1 || s > 0};
        Acc hidden[kSlotsPerBlock];
        if (p_.pre_value_dim > 0) hidden_units(block, scratch.pre_input, hidden);
        add_rows(block, hidden, scratch.out);
      }
      round_to(static_cast<T*>(p_.out) + token * out_size, scratch.out, out_size);
    }
    return true;
  }

  struct Block {
    int64_t first_entry;  // in [T, S]
    int count;
    const int64_t* slots;
    const int64_t* groups;
    const int64_t* slots_end;  // of the tile
    bool accumulate;
  };

  // h = act(<pre_input, P>), while the pre-values of the slots that come next are fetched.
  void hidden_units(const Block& block, const Acc* pre_input, Acc* hidden) const {
    const int64_t* next = block.slots + kSlotsPerBlock;
    const auto fetch_next = [&] {
      if (next < block.slots_end) fetch_pre_value_row(*next++);
    };
    // Those of the slots in memory, and of which slot of the block.
    const Table* rows[kSlotsPerBlock];
    int places[kSlotsPerBlock];
    int count = 0;
    for (int i = 0; i < block.count; ++i) {
      if (block.slots[i] >= 0) {
        rows[count] = pre_value_row(block.slots[i]);
        places[count++] = i;
      } else {
        fetch_next();
      }
    }
    Acc dots[kSlotsPerBlock];
    int i = 0;
    for (; i + kSlotsAtOnce <= count; i += kSlotsAtOnce) {
      for (int k = 0; k < kSlotsAtOnce; ++k) fetch_next();
      dot_rows<kSlotsAtOnce>(pre_input, rows + i, 0, p_.pre_value_dim, dots + i);
    }
    for (; i < count; ++i) {
      fetch_next();
      dot_rows<1>(pre_input, rows + i, 0, p_.pre_value_dim, dots + i);
    }
    Acc a[kSlotsPerBlock] = {};
    for (int k = 0; k < count; ++k) a[places[k]] = dots[k] * pre_value_scale_;
    __builtin_memcpy(static_cast<Acc*>(p_.pre_activation) + block.first_entry, a,
                     static_cast<size_t>(block.count) * sizeof(Acc));
    activate<Acc>(p_.activation, a, block.count, hidden, nullptr);
  }

  // out[group] += h g_c V_c, while the values of the slots that come next are fetched.
  void add_rows(const Block& block, const Acc* hidden, Acc* out) const {
    const int64_t groups = num_groups(p_), cores = p_.num_cores, width = p_.value_dim / cores;
    const Acc* scores = static_cast<const Acc*>(p_.scores) + block.first_entry * cores;
    const int64_t* next = block.slots + kSlotsPerBlock;
    const auto fetch_next = [&](int) {
      if (next < block.slots_end) fetch_value_row(*next++);
    };
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t c = 0; c < cores; ++c) {
        Terms<Table> terms;
        for (int i = 0; i < block.count; ++i) {
          if (groups > 1 && block.groups[i] != group) continue;
          if (block.slots[i] < 0) {
            if (c == 0) fetch_next(i);
            continue;
          }
          const Acc score = value_scale_ * scores[i * cores + c];
          terms.add(p_.pre_value_dim > 0 ? hidden[i] * score : score,
                    value_row(block.slots[i]) + c * width);
        }
        Acc* sum = out + group * p_.value_dim + c * width;
        if (c == 0) {
          weighted_sum(sum, width, terms, nullptr, block.accumulate, fetch_next);
        } else {
          weighted_sum(sum, width, terms, nullptr, block.accumulate);
        }
      }
    }
  }

  const ValueFfnParams& p_;
  const Executor& executor_;
  const size_t scratch_bytes_;
  const Acc value_scale_, pre_value_scale_;
};

}  // namespace

size_t value_ffn_fwd_workspace(const ValueFfnParams& params, const Executor& executor) {
  const size_t bytes = params.table_dtype == DType::kFloat64 ? scratch_bytes<double>(params)
                                                             : scratch_bytes<float>(params);
  return bytes * static_cast<size_t>(worker_count(executor));
}

StatusCode value_ffn_fwd(const ValueFfnParams& params, const Executor& executor) {
  return with_type(params.table_dtype, [&](auto table) {
    using Table = decltype(table);
    return with_type_accumulating_in<AccOf<Table>>(params.dtype, [&](auto type) {
      return Forward<Table, decltype(type)>(params, executor).run();
    });
  });
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
