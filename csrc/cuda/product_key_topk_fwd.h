// The stages of the product_key_topk forward.
#pragma once

#include "ultramem/product_key_topk.h"

namespace ultramem::cuda {

// The best axis_topk keys of either side, ascending by key id, and their scores: axis_indices and
// axis_scores. Any shape and alignment.
Status launch_axis_generic(const ProductKeyTopkParams& params, Stream stream);

// The same on the tensor cores of sm_90a, where axis_wgmma_applies. In builds with that code only.
bool axis_wgmma_applies(const ProductKeyTopkParams& params);
Status launch_axis_wgmma(const ProductKeyTopkParams& params, Stream stream);

// The best topk pairs of the kept keys: scores, indices and grid_positions.
Status launch_grid(const ProductKeyTopkParams& params, Stream stream);

}  // namespace ultramem::cuda
