// Factors of the tables' gradients: one pass over the entries and one copy of the tokens' rows. da
// has been written by the backward, or is given.
#include "../parallel.h"
#include "../slots.h"
#include "activation.h"
#include "kernels.h"
#include "value_ffn_common.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

template <typename Acc>
class Factors {
 public:
  Factors(const ValueFfnBwdDeferredParams& params, int64_t position)
      : p_(params), f_(params.factors), position_(position) {}

  // False where an index is out of range.
  bool token_tile(int64_t first, int64_t last) const {
    const int64_t end = last * p_.num_selected;
    for (int64_t entry = first * p_.num_selected; entry < end; entry += kSlotsPerBlock) {
      if (!write_entries(entry, static_cast<int>(smaller(kSlotsPerBlock, end - entry)))) {
        return false;
      }
    }
    const int64_t element = element_size(f_.dtype);
    copy_rows(f_.grad_outs, p_.grad_out, f_.num_groups * f_.value_dim * element, first, last);
    copy_rows(f_.pre_inputs, p_.pre_input, f_.pre_value_dim * element, first, last);
    return true;
  }

 private:
  bool write_entries(int64_t first, int count) const {
    int64_t slots[kSlotsPerBlock], groups[kSlotsPerBlock];
    if (!resolve_slots(p_, first, first + count, slots, groups)) return false;
    Acc hidden[kSlotsPerBlock];
    if (p_.pre_activation != nullptr) {
      Acc a[kSlotsPerBlock] = {};
      __builtin_memcpy(a, static_cast<const Acc*>(p_.pre_activation) + first,
                       static_cast<size_t>(count) * sizeof(Acc));
      activate<Acc>(p_.activation, a, count, hidden, nullptr);
    } else {
      for (Acc& h : hidden) h = 1;
    }
    const int64_t to = position_ * p_.num_selected + first;
    const Acc* scores = static_cast<const Acc*>(p_.scores) + first * p_.num_cores;
    Acc* weights = static_cast<Acc*>(f_.weights) + to * p_.num_cores;
    const auto* grad_a = static_cast<const Acc*>(p_.grad_a);
    for (int i = 0; i < count; ++i) {
      const bool in_memory = slots[i] >= 0;
      f_.slots[to + i] = in_memory ? static_cast<uint32_t>(slots[i]) : kNoSlot;
      if (f_.groups != nullptr) f_.groups[to + i] = static_cast<uint8_t>(groups[i]);
      for (int c = 0; c < p_.num_cores; ++c) {
        weights[i * p_.num_cores + c] =
            in_memory ? hidden[i] * scores[i * p_.num_cores + c] : Acc{0};
      }
      if (grad_a != nullptr) {
        static_cast<Acc*>(f_.grad_a)[to + i] = in_memory ? grad_a[first + i] : Acc{0};
      }
    }
    return true;
  }

  void copy_rows(void* to, const void* from, int64_t row_bytes, int64_t first, int64_t last) const {
    if (row_bytes == 0) return;
    __builtin_memcpy(static_cast<char*>(to) + (position_ + first) * row_bytes,
                     static_cast<const char*>(from) + first * row_bytes,
                     static_cast<size_t>((last - first) * row_bytes));
  }

  const ValueFfnBwdDeferredParams& p_;
  const TableFactors& f_;
  const int64_t position_;
};

}  // namespace

StatusCode value_ffn_factors(const ValueFfnBwdDeferredParams& params, int64_t position,
                             const Executor& executor) {
  int64_t bad_tiles = 0;
  const int64_t tile_tokens = tokens_per_tile(params);
  parallel_tiles(executor, div_up(params.num_tokens, tile_tokens), [&](int64_t, int64_t tile) {
    const int64_t first = tile * tile_tokens;
    const int64_t last = smaller(params.num_tokens, first + tile_tokens);
    const bool in_range = params.table_dtype == DType::kFloat64
                              ? Factors<double>(params, position).token_tile(first, last)
                              : Factors<float>(params, position).token_tile(first, last);
    if (!in_range) __atomic_fetch_add(&bad_tiles, 1, __ATOMIC_RELAXED);
  });
  return bad_tiles == 0 ? StatusCode::kOk : StatusCode::kOutOfRange;
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
