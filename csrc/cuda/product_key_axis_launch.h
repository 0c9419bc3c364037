// What the axis stage's kernels of sm_90 need for a launch.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "device.h"
#include "product_key_sample.h"
#include "ultramem/product_key_topk.h"
#include "wgmma.cuh"

namespace ultramem::cuda {

// Tensor maps of the queries, whose planes are (side, head, query), in boxes of so many tokens, and
// of the keys, whose planes are (head, side, rank), in boxes of so many keys.
inline Status make_axis_maps(const ProductKeyTopkParams& p, int box_tokens, int box_keys,
                             CUtensorMap* query_map, CUtensorMap* key_map) {
  const int64_t query_planes = int64_t{2} * p.num_heads * p.num_queries;
  ULTRAMEM_RETURN_IF_ERROR(make_tensor_map(query_map, p.query, p.dtype, p.key_dim, p.num_tokens,
                                           query_planes, query_planes * p.key_dim, p.key_dim,
                                           box_tokens));
  return make_tensor_map(key_map, p.keys, p.dtype, p.key_dim, p.num_keys,
                         int64_t{2} * p.num_heads * p.tucker_rank, p.key_dim,
                         p.num_keys * p.key_dim, box_keys);
}

// The sample's tensor map: rows as far apart as a piece's keys, in planes each of which begins a
// key later than the one before. Piece by piece, those that begin with a key of (head, side, rank).
inline Status make_sample_map(const ProductKeyTopkParams& p, const Sample& sample,
                              CUtensorMap* map) {
  return make_tensor_map(map, p.keys, p.dtype, p.key_dim,
                         std::min<int64_t>(p.num_keys, Sample::kPieceKeys),
                         int64_t{2} * p.num_heads * p.tucker_rank * p.num_keys,
                         sample.stride * p.key_dim, p.key_dim, Sample::kPieceKeys);
}

}  // namespace ultramem::cuda
