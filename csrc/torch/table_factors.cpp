#include "table_factors.h"

#include <unordered_map>

#define ULTRAMEM_EXPORT extern "C" __attribute__((visibility("default")))

namespace ultramem::torch_binding {
namespace {

// How much an arena on a GPU holds, as far as the host launched it: reading the header would wait
// for the GPU. Compiled code calls the operators without Python, so it is known here or nowhere.
struct ArenaState {
  int64_t num_tokens = 0;
  int64_t overflow = 0;
  // A captured CUDA graph appends or clears at its replays, which nobody counts.
  bool captured = false;
  int64_t appends = 0;  // all that were launched or captured
};

struct ArenaStates {
  std::unordered_map<const void*, ArenaState> arenas;  // by their beginning
  // Appends to memory that is not among `arenas`: a compiler's copy of one of them, which replaces
  // it later, or an arena of somebody else's.
  int64_t strangers = 0;
  bool strangers_captured = false;
};

ArenaStates& states() {
  static ArenaStates states;
  return states;
}

}  // namespace

std::mutex& factors_mutex() {
  static std::mutex mutex;
  return mutex;
}

TableFactors table_factors(const OpContext& context, Tensor& arena,
                           const TableFactorsShape& shape) {
  context.check_shape("factors", arena, "[bytes]", {-1});
  context.check_dtype("factors", arena, ScalarType::Byte);
  context.check(arena.is_contiguous(), "factors must be contiguous");
  void* memory = arena.mutable_data_ptr();
  context.check(reinterpret_cast<uintptr_t>(memory) % 16 == 0,
                "factors must begin at a multiple of 16 bytes");
  const TableFactors factors = factors_in(shape, memory, arena.numel());
  context.check(
      factors.header != nullptr,
      "factors must have the size of an arena for S = " + std::to_string(shape.num_selected) +
          ", C = " + std::to_string(shape.num_cores) + ", E = " + std::to_string(shape.num_groups) +
          " and rows of these widths and dtypes, 256 + 256 * k * " +
          std::to_string(factors_sections(shape).end) + " bytes, got " +
          std::to_string(arena.numel()));
  return factors;
}

void note_append(const OpContext& context, const TableFactors& factors, int64_t num_tokens) {
#if defined(ULTRAMEM_WITH_CUDA)
  if (!context.is_cuda()) return;
  bool capturing = false;
  context.check(cuda::is_capturing(context.stream(), &capturing));
  const auto found = states().arenas.find(factors.header);
  if (found == states().arenas.end()) {
    ++states().strangers;
    states().strangers_captured |= capturing;
    return;
  }
  ArenaState& state = found->second;
  ++state.appends;
  if (capturing) {
    state.captured = true;
  } else if (num_tokens <= factors.capacity - state.num_tokens) {
    state.num_tokens += num_tokens;
  } else {
    state.overflow += num_tokens;
  }
#else
  (void)context;
  (void)factors;
  (void)num_tokens;
#endif
}

}  // namespace ultramem::torch_binding

// What ultramem_cuda/factors.py asks through ctypes
// -------------------------------------------------

namespace binding = ultramem::torch_binding;

// Bytes a token takes before each section and in all: TableFactorsSections. Fields of `shape`, in
// the order of TableFactorsShape: S, Dv, Dp, C, groups, table dtype, dtype.
ULTRAMEM_EXPORT void ultramem_factors_sections(const int64_t* shape, int64_t* sections) {
  ultramem::TableFactorsShape s;
  s.num_selected = shape[0];
  s.value_dim = shape[1];
  s.pre_value_dim = shape[2];
  s.num_cores = static_cast<int32_t>(shape[3]);
  s.num_groups = static_cast<int32_t>(shape[4]);
  s.table_dtype = static_cast<ultramem::DType>(shape[5]);
  s.dtype = static_cast<ultramem::DType>(shape[6]);
  const ultramem::TableFactorsSections before = ultramem::factors_sections(s);
  const int64_t all[] = {before.slots,     before.weights,    before.grad_a, before.groups,
                         before.grad_outs, before.pre_inputs, before.end};
  for (int i = 0; i < 7; ++i) sections[i] = all[i];
}

// state: tokens held, tokens that did not fit, whether a captured graph appends (then neither is
// known), the number of appends that might have been to a copy of this arena, and that of appends
// to it that were launched or captured.
ULTRAMEM_EXPORT void ultramem_factors_state(const void* arena, int64_t* state) {
  const std::lock_guard<std::mutex> lock(binding::factors_mutex());
  const binding::ArenaStates& all = binding::states();
  const auto found = all.arenas.find(arena);
  const binding::ArenaState known =
      found == all.arenas.end() ? binding::ArenaState{} : found->second;
  state[0] = known.num_tokens;
  state[1] = known.overflow;
  state[2] = known.captured || all.strangers_captured ? 1 : 0;
  state[3] = all.strangers;
  state[4] = known.appends;
}

// There is a new arena there, of which no graph knows; or an old one is gone.
ULTRAMEM_EXPORT void ultramem_factors_forget(const void* arena) {
  const std::lock_guard<std::mutex> lock(binding::factors_mutex());
  binding::states().arenas.erase(arena);
}

// It now holds that many tokens; `captured`: once a graph that is being captured has run.
ULTRAMEM_EXPORT void ultramem_factors_set(const void* arena, int64_t num_tokens, int64_t overflow,
                                          int32_t captured) {
  const std::lock_guard<std::mutex> lock(binding::factors_mutex());
  binding::ArenaState& state = binding::states().arenas[arena];
  state.num_tokens = num_tokens;
  state.overflow = overflow;
  state.captured |= captured != 0;
}
