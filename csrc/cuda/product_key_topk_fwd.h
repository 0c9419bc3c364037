// The stages of the product_key_topk forward.
#pragma once

#include "ultramem/product_key_topk.h"

namespace ultramem::cuda {

// The best axis_topk keys of either side, ascending by key id, and their scores: axis_indices and
// axis_scores. Any shape and alignment.
Status launch_axis_generic(const ProductKeyTopkParams& params, Stream stream);

// The same on the tensor cores of sm_90a, where axis_wgmma_applies. In builds with that code only.
// With left_over, which the kernel ahead in the stream writes, [2 * num_heads, blocks of 128
// tokens], only the tokens of the blocks that it marks, for axis_topk up to kAxisResidentMaxTopk.
bool axis_wgmma_applies(const ProductKeyTopkParams& params);
Status launch_axis_marked_lists(const ProductKeyTopkParams& params, Stream stream,
                                const int32_t* left_over);
inline Status launch_axis_lists(const ProductKeyTopkParams& params, Stream stream) {
  return launch_axis_marked_lists(params, stream, nullptr);
}

// Of what that takes, R = 2 and keys of 200 to 512 elements, a rank on either of two blocks: where
// axis_split_applies. Needs axis_split_workspace(params) bytes of workspace.
bool axis_split_applies(const ProductKeyTopkParams& params);
size_t axis_split_workspace(const ProductKeyTopkParams& params);
// filter_ahead: the kernel ahead on the stream is that of the filter and nothing else is still
// under way, so that all but the filter may be read at once.
Status launch_axis_split(const ProductKeyTopkParams& params, Stream stream, bool filter_ahead);

// Of the rest, where axis_candidates_applies: R up to 2 and either large m or tokens for no more
// blocks than run at once. Needs axis_candidates_workspace(params) bytes of workspace.
bool axis_candidates_applies(const ProductKeyTopkParams& params);
size_t axis_candidates_workspace(const ProductKeyTopkParams& params);
Status launch_axis_candidates(const ProductKeyTopkParams& params, Stream stream);

// The second half of both, for the tokens of a chunk.
template <int kLists, bool kRecords>
struct Candidates;
Status launch_pick(const ProductKeyTopkParams& params, const Candidates<2, false>& candidates,
                   int64_t first_token, Stream stream);
Status launch_pick(const ProductKeyTopkParams& params, const Candidates<2, true>& candidates,
                   int64_t first_token, Stream stream);
// The same for axis_mma.
Status launch_pick(const ProductKeyTopkParams& params, const Candidates<4, false>& candidates,
                   int64_t first_token, Stream stream);

// The same on the tensor cores of sm_80 and later, in builds without code for sm_90a, too, where
// axis_mma_applies. Needs axis_mma_workspace(params) bytes of workspace.
bool axis_mma_applies(const ProductKeyTopkParams& params);
size_t axis_mma_workspace(const ProductKeyTopkParams& params);
Status launch_axis_mma(const ProductKeyTopkParams& params, Stream stream);

// Of the rest, R = 2, short keys and small m: where axis_resident_applies. Needs
// axis_resident_workspace(params) bytes of workspace.
inline constexpr int kAxisResidentMaxKeyDim = 192;
inline constexpr int kAxisResidentMaxTopk = 32;
inline bool axis_resident_applies(const ProductKeyTopkParams& p) {
  return p.tucker_rank == 2 && p.key_dim <= kAxisResidentMaxKeyDim &&
         p.axis_topk <= kAxisResidentMaxTopk;
}
size_t axis_resident_workspace(const ProductKeyTopkParams& params);
// filter_ahead as of launch_axis_split.
Status launch_axis_resident(const ProductKeyTopkParams& params, Stream stream, bool filter_ahead);

// On those of sm_80 and later as well, for few tokens, where axis_small_applies. Needs
// axis_small_workspace(params) bytes of workspace.
bool axis_small_applies(const ProductKeyTopkParams& params);
size_t axis_small_workspace(const ProductKeyTopkParams& params);
Status launch_axis_small(const ProductKeyTopkParams& params, Stream stream);
// Its first kernel alone: all scores, in the workspace, [T, H, 2, R, small_score_stride(params)].
int small_score_stride(const ProductKeyTopkParams& params);
Status launch_small_scores(const ProductKeyTopkParams& params, Stream stream);
// The same on the tensor cores of sm_90a, of what that takes where small_scores_wgmma_applies. In
// builds with that code only.
bool small_scores_wgmma_applies(const ProductKeyTopkParams& params);
Status launch_small_scores_wgmma(const ProductKeyTopkParams& params, Stream stream);

// The rest of both stages behind that, with a block for each token and head, where token_applies.
bool token_applies(const ProductKeyTopkParams& params);
Status launch_token(const ProductKeyTopkParams& params, int score_stride, Stream stream);

// The best topk pairs of the kept keys: scores, indices and grid_positions. `overlapping`: what is
// ahead in the stream is the axis stage of the same call, which lets this begin before it has
// ended.
Status launch_grid(const ProductKeyTopkParams& params, Stream stream, bool overlapping = false);

// The same for few kept keys a side: where grid_small_applies.
bool grid_small_applies(const ProductKeyTopkParams& params);
Status launch_grid_small(const ProductKeyTopkParams& params, Stream stream, bool overlapping);

// The same with a block for each token and head, for few of them: where grid_block_applies.
bool grid_block_applies(const ProductKeyTopkParams& params);
Status launch_grid_block(const ProductKeyTopkParams& params, Stream stream, bool overlapping);

}  // namespace ultramem::cuda
