#include "ultramem/tucker_filter.h"

#include "common/tucker_filter_head.h"

namespace ultramem::cpu {
namespace {

template <int R>
void filter_heads(const TuckerFilterParams& params) {
  for (int64_t head = 0; head < params.num_heads; ++head) tucker_filter_head<R>(params, head);
}

}  // namespace

Status tucker_filter(const TuckerFilterParams& params) {
  const Status status = check_tucker_filter(params);
  if (!status.ok()) return status;
  switch (params.tucker_rank) {
    case 1:
      filter_heads<1>(params);
      break;
    case 2:
      filter_heads<2>(params);
      break;
    case 3:
      filter_heads<3>(params);
      break;
    default:
      filter_heads<4>(params);
  }
  return {};
}

}  // namespace ultramem::cpu
