// Where the forward of product_key_topk computes the filter itself (product_key_topk.h,
// own_filter).
#pragma once

#include <cstddef>

#include "ultramem/product_key_topk.h"
#include "ultramem/tucker_filter.h"

namespace ultramem {

inline bool computes_filter(const ProductKeyTopkParams& p) {
  return p.mode == ScoreMode::kTucker && p.u == nullptr && p.t == nullptr &&
         p.own_filter != nullptr;
}

// The parameters of a forward whose filter is there, or will be when it is needed.
inline ProductKeyTopkParams with_filter(const ProductKeyTopkParams& params) {
  ProductKeyTopkParams p = params;
  if (!computes_filter(params)) return p;
  const size_t bytes = static_cast<size_t>(p.num_heads) * static_cast<size_t>(p.tucker_rank) *
                       element_size(accumulation_dtype(p.dtype));
  p.u = p.own_filter;
  p.t = static_cast<char*>(p.own_filter) + bytes;
  return p;
}

// What computes the filter of such parameters.
inline TuckerFilterParams filter_params(const ProductKeyTopkParams& p) {
  TuckerFilterParams params;
  params.num_cores = p.num_cores;
  params.num_heads = p.num_heads;
  params.tucker_rank = p.tucker_rank;
  params.dtype = accumulation_dtype(p.dtype);
  params.core = p.core;
  params.u = const_cast<void*>(p.u);
  params.t = const_cast<void*>(p.t);
  return params;
}

}  // namespace ultramem
