#include "slot_addressing.h"

#include <cstdlib>

namespace ultramem::torch_binding {
namespace {

#if defined(ULTRAMEM_WITH_CUDA)
bool debug_enabled() {
  static const bool enabled = [] {
    const char* value = std::getenv("ULTRAMEM_DEBUG");
    return value != nullptr && value[0] == '1';
  }();
  return enabled;
}
#endif

void check_shuffle(const OpContext& context, const AddressingArguments& arguments,
                   AddressingParams& params) {
  if (arguments.shuffle == "feistel") {
    params.shuffle = Shuffle::kFeistel;
    context.check(
        params.num_keys > 0 && params.num_keys * params.num_keys == params.expand * params.window,
        "shuffle='feistel' needs num_keys^2 == expand * window, got num_keys = " +
            std::to_string(params.num_keys) +
            ", expand * window = " + std::to_string(params.expand * params.window));
  } else if (arguments.shuffle == "permutation") {
    params.shuffle = Shuffle::kPermutation;
    context.check(arguments.permutation.has_value(), "shuffle='permutation' needs a permutation");
    context.check_shape("permutation", *arguments.permutation, "[expand * window]",
                        {params.expand * params.window});
    context.check_dtype("permutation", *arguments.permutation, ScalarType::Long);
    params.permutation = static_cast<const int64_t*>(arguments.permutation->const_data_ptr());
  } else {
    context.check(
        arguments.shuffle == "none",
        "shuffle must be 'none', 'feistel' or 'permutation', got '" + arguments.shuffle + "'");
  }
}

}  // namespace

AddressingParams make_addressing(const OpContext& context, const AddressingArguments& arguments,
                                 int64_t num_rows) {
  AddressingParams params;
  const int64_t num_slots = arguments.num_slots == 0 ? num_rows : arguments.num_slots;
  context.check(arguments.first_row >= 0 && arguments.first_row <= num_slots - num_rows,
                "rows [first_row, first_row + N) must lie in [0, num_slots), got first_row = " +
                    std::to_string(arguments.first_row) + ", N = " + std::to_string(num_rows) +
                    ", num_slots = " + std::to_string(num_slots));
  params.num_slots = num_slots;
  params.first_row = arguments.first_row;
  params.num_rows = num_rows;
  params.window = arguments.window;
  params.expand = arguments.expand;
  params.num_keys = arguments.num_keys;
  params.mixed_seed = mix64(static_cast<uint64_t>(arguments.seed));
  context.check(params.expand >= 1,
                "expand must be positive, got " + std::to_string(params.expand));
  if (params.window == 0) {  // the index is the slot
    context.check(params.expand == 1 && arguments.shuffle == "none",
                  "expand and shuffle need a window");
    return params;
  }
  context.check(params.window > 0 && params.window <= num_slots,
                "window must be in 1..num_slots = " + std::to_string(num_slots) + ", got " +
                    std::to_string(params.window));
  params.offset = (arguments.offset % num_slots + num_slots) % num_slots;
  check_shuffle(context, arguments, params);
  return params;
}

void take_indices(const OpContext& context, const Tensor& indices, ValueFfnParams& params) {
  context.check_shape("indices", indices, "[T, S]", {-1, -1});
  const ScalarType type = indices.scalar_type();
  context.check(type == ScalarType::Long || type == ScalarType::Int,
                "indices must be int64 or int32");
  params.num_tokens = indices.size(0);
  params.num_selected = indices.size(1);
  params.indices_are_int64 = type == ScalarType::Long;
  params.indices = indices.const_data_ptr();
}

void check_indices_in_debug(const OpContext& context, const ValueFfnParams& params) {
#if defined(ULTRAMEM_WITH_CUDA)
  if (!context.is_cuda() || !debug_enabled()) return;
  Tensor flag = context.zeros({1}, ScalarType::Int);
  context.check(cuda::check_indices(params, static_cast<int32_t*>(flag.mutable_data_ptr()),
                                    context.stream()));
  Tensor host_flag =
      torch::stable::to(flag, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  context.check(*static_cast<const int32_t*>(host_flag.const_data_ptr()) == 0,
                "indices must be in [0, " + std::to_string(params.addressing.num_indices()) +
                    "), found one outside");
#else
  (void)context;
  (void)params;
#endif
}

void check_status(const OpContext& context, const Status& status, const ValueFfnParams& params) {
  if (status.code == StatusCode::kOutOfRange) {
    const int64_t end = params.addressing.num_indices();
    for (int64_t i = 0; i < params.num_tokens * params.num_selected; ++i) {
      const int64_t index = params.indices_are_int64
                                ? static_cast<const int64_t*>(params.indices)[i]
                                : static_cast<const int32_t*>(params.indices)[i];
      context.check(index >= 0 && index < end, "indices must be in [0, " + std::to_string(end) +
                                                   "), got " + std::to_string(index) + " at [" +
                                                   std::to_string(i / params.num_selected) + ", " +
                                                   std::to_string(i % params.num_selected) + "]");
    }
  }
  context.check(status);
}

}  // namespace ultramem::torch_binding
