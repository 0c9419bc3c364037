// The slots of a token in one pass over both tables, for rows of whole 16-byte vectors. The dot
// product of one table's row with the token's input gives the weight by which the slot's row of the
// other table is added to the token's output. Forward and backward differ in which table is which
// and in how the weight comes about: the `Pass`.
//
// While a warp works on one step, the rows of the next are on their way to shared memory. Every
// lane reads back only what it has requested itself, so that warps wait for nothing but their own
// copies.
//
// The order of a sum depends on the shape of a token's slots, not on how many tokens there are or
// how many warps share one: slots are cut into parts, a part is summed slot by slot, the parts of a
// group are added in order, then groups, and the teams of a warp, each of which has its own sum, at
// the end.
#pragma once

#include <algorithm>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "device.h"
#include "ultramem/table_factors.h"
#include "value_ffn_common.cuh"
#include "value_ffn_lane_rows.cuh"

namespace ultramem::cuda::value_ffn {

// kLanes neighbouring lanes, a team, work on a slot. Of each of its two rows lane l has the vectors
// l, l + kLanes, ..., kVectors at most.
template <typename TableT_, int kLanes_, int kVectors_>
struct SlotTraits {
  using TableT = TableT_;
  static constexpr int kLanes = kLanes_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kTeams = kWarpSize / kLanes;
  static constexpr int kElements = kVector<TableT>;  // of a vector
  static constexpr int kQuads = kElements / 4;       // float4 that hold a vector's sums
  static constexpr int kMaxRow = kLanes * kVectors;  // in vectors
  // What the registers of a multiprocessor suffice for: a lane has the input and the sums of all
  // its vectors.
  static constexpr int kMaxWarps = kVectors <= 3 ? 16 : kVectors <= 4 ? 12 : 8;
};

// Steps that a warp has requested before it works on the first of them; a step is a slot for each
// of its teams.
inline constexpr int kStages = 2;
// Slots whose addresses a warp works out at a time, one a lane.
inline constexpr int kBatch = kWarpSize;
static_assert(kStages * kWarpSize / 8 <= kBatch, "two batches are enough for teams of 8 lanes");

// What the kernel has beside the operator's parameters: the two tables by their role, rows in
// vectors, and how a token's slots are shared out.
struct SlotArguments {
  const void* input;        // [T, dot row]
  const void* dot_table;    // [N, dot row]
  const void* sum_table;    // [N, sum row]
  void* output;             // [T, sum row]
  const double* dot_scale;  // of the tables; null for 1
  const double* sum_scale;
  int dot_vectors;    // of a row; 0 where there are no dot products
  int sum_vectors;    // 0 where no sum is wanted
  int slice_vectors;  // of a core's slice of a value
  int num_selected, num_cores;
  AddressDivisors<ReciprocalDivisor> divisors;

  int part_steps;   // of a part; a part has its place in the order of the sum
  int num_parts;    // of a token
  int group_parts;  // of a group
  int warp_parts;   // of a warp
  int place_parts;  // added up in one place in shared memory: one, or a group
  int warp_places;  // of a warp: for its parts or groups, or for all groups and for the present one
  int token_places;  // what is left to be added up at the end
  int token_blocks;  // that share a token; more than one are a cluster
  int stages;        // places of the ring of steps
  bool adds_groups;  // a warp has the token to itself and adds the groups up as well
};

// x summed over the lanes of a team, for all of them.
template <int kLanes>
__device__ __forceinline__ float team_sum(float x) {
#pragma unroll
  for (int delta = kLanes / 2; delta > 0; delta /= 2) x += __shfl_xor_sync(kFullMask, x, delta);
  return x;
}

// Element j of a vector. One instruction: a bfloat16 is the upper half of a float.
template <typename TableT>
__device__ __forceinline__ float element(const uint4& vector, int j) {
  if constexpr (std::is_same_v<TableT, __nv_bfloat16>) {
    const uint32_t pair = reinterpret_cast<const uint32_t*>(&vector)[j / 2];
    return __uint_as_float(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  } else {
    return to_float(reinterpret_cast<const TableT*>(&vector)[j]);
  }
}

template <typename Traits>
__host__ __device__ constexpr int lane_vectors(int row_vectors) {
  return (row_vectors + Traits::kLanes - 1) / Traits::kLanes;
}

// float4 that hold the sums of a part: those of a team side by side, and in there the lanes'.
template <typename Traits>
__host__ __device__ constexpr int part_quads(int sum_vectors) {
  return Traits::kTeams * lane_vectors<Traits>(sum_vectors) * Traits::kQuads * Traits::kLanes;
}

// Where a lane's first of kQuads sums of vector v lies, within its team's.
template <typename Traits>
__device__ __forceinline__ int quad_of(int v, int rank) {
  return v * Traits::kQuads * Traits::kLanes + rank;
}

// Shared memory: the sums, then for every warp its ring of steps and two batches of slots.
template <typename Traits>
__host__ __device__ constexpr int ring_bytes(const SlotArguments& arguments) {
  const int row_vectors =
      lane_vectors<Traits>(arguments.dot_vectors) + lane_vectors<Traits>(arguments.sum_vectors);
  return arguments.stages * row_vectors * kWarpSize * 16;
}

template <typename Traits>
__host__ __device__ constexpr int sum_bytes(const SlotArguments& arguments, int num_warps) {
  return num_warps * arguments.warp_places * part_quads<Traits>(arguments.sum_vectors) * 16;
}

template <typename Traits, typename Pass>
int64_t shared_bytes(const SlotArguments& arguments, int num_warps) {
  const int64_t warp_bytes = ring_bytes<Traits>(arguments) + 2 * sizeof(typename Pass::Batch);
  return sum_bytes<Traits>(arguments, num_warps) + num_warps * warp_bytes;
}

// x + -0 is x, even for -0.
inline constexpr float kNoSum = -0.0f;

// A float4 of the sums in a block of the token's cluster.
__device__ __forceinline__ float4 sums_in_block(const float4* sums, bool has_others, int block) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (has_others) return load_in_block(address_in_block(shared_address(sums), block));
#endif
  return *sums;
}

__device__ __forceinline__ void add_quad(float (&sum)[4], const float4& x) {
  sum[0] += x.x;
  sum[1] += x.y;
  sum[2] += x.z;
  sum[3] += x.w;
}

// Adds up what a token's places hold and then the teams' sums, four columns a thread, and stores
// the output.
template <typename Traits>
__device__ __forceinline__ void store_sum(const SlotArguments& arguments, const float4* sums,
                                          int block_places, DType dtype, int64_t token, int block) {
  constexpr int kQuads = Traits::kQuads;
  constexpr int kUnroll = Traits::kTeams == 1 ? 8 : 2;
  const int team_quads = part_quads<Traits>(arguments.sum_vectors) / Traits::kTeams;
  const int num_places = arguments.token_places;
  // Places that are parts are added up to groups first.
  const int group_places = arguments.place_parts == 1 ? arguments.group_parts : 1;
  const int num_quads = arguments.sum_vectors * kQuads;
  const int num_blocks = arguments.token_blocks;
  for (int quad = threadIdx.x * num_blocks + block; quad < num_quads;
       quad += blockDim.x * num_blocks) {
    const int vector = quad / kQuads;
    const float4* from = sums + quad_of<Traits>(vector / Traits::kLanes, vector % Traits::kLanes) +
                         quad % kQuads * Traits::kLanes;
    float total[Traits::kTeams][4], group[Traits::kTeams][4];
#pragma unroll
    for (int team = 0; team < Traits::kTeams; ++team) {
#pragma unroll
      for (int j = 0; j < 4; ++j) total[team][j] = group[team][j] = kNoSum;
    }
    int from_block = 0, in_block = 0, in_group = 0;
    // Without branches, so that several places are read at once.
#pragma unroll kUnroll
    for (int place = 0; place < num_places; ++place) {
      ++in_group;
      const bool ends_group = in_group == group_places || place + 1 == num_places;
      in_group = ends_group ? 0 : in_group;
#pragma unroll
      for (int team = 0; team < Traits::kTeams; ++team) {
        add_quad(group[team], sums_in_block(from + (in_block * Traits::kTeams + team) * team_quads,
                                            num_blocks > 1, from_block));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total[team][j] += ends_group ? group[team][j] : kNoSum;
          group[team][j] = ends_group ? kNoSum : group[team][j];
        }
      }
      ++in_block;
      const bool ends_block = in_block == block_places;
      in_block = ends_block ? 0 : in_block;
      from_block += ends_block ? 1 : 0;
    }
#pragma unroll
    for (int delta = 1; delta < Traits::kTeams; delta *= 2) {
#pragma unroll
      for (int team = 0; team < Traits::kTeams; team += 2 * delta) {
#pragma unroll
        for (int j = 0; j < 4; ++j) total[team][j] += total[team + delta][j];
      }
    }
    if (arguments.sum_scale != nullptr) {
      const auto scale = static_cast<float>(*arguments.sum_scale);
#pragma unroll
      for (int j = 0; j < 4; ++j) total[0][j] *= scale;
    }
    store_elements(arguments.output, dtype, (token * num_quads + quad) * 4, total[0]);
  }
}

// The kernel. A Pass has
//   Batch                               what it keeps of 32 slots in shared memory: `slots`,
//                                       kNoSlot where there is nothing to read, and more
//   Request request(entry, exists)      what a lane reads of an entry of [T, S], not yet waited for
//   settle(request, batch, i, entry, exists)
//                                       .. worked out and written to place i of a batch
//   begin()                             what it needs of what earlier kernels wrote
//   weigh<Traits>(dots, cores, batch, i, entry, exists, rank, weights)
//                                       from dot products by vector to the weight by which each
//                                       vector of the other row is added; `cores` are those of the
//                                       vectors of the value's row
//   finish(token)                       .. by a block of each token, when all else is requested
template <typename Traits, typename Pass>
__device__ __forceinline__ void pass_over_slots(Pass pass, const SlotArguments& arguments,
                                                DType dtype) {
  constexpr int kVectors = Traits::kVectors;
  constexpr int kLanes = Traits::kLanes;
  constexpr int kTeams = Traits::kTeams;
  constexpr int kElements = Traits::kElements;
  using TableT = typename Traits::TableT;
  using Batch = typename Pass::Batch;
  static_assert(sizeof(Batch) % 16 == 0, "what follows in shared memory is aligned");
  extern __shared__ __align__(16) unsigned char shared[];

  const int num_warps = blockDim.x / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int team = lane / kLanes;
  const int rank = lane % kLanes;
  const int64_t token = blockIdx.x / arguments.token_blocks;
  const int block = blockIdx.x % arguments.token_blocks;

  auto* sums = reinterpret_cast<float4*>(shared);
  const int warp_bytes = ring_bytes<Traits>(arguments) + 2 * sizeof(Batch);
  unsigned char* of_warp = shared + sum_bytes<Traits>(arguments, num_warps) + warp * warp_bytes;
  auto* ring = reinterpret_cast<uint4*>(of_warp);
  auto* batches = reinterpret_cast<Batch*>(of_warp + ring_bytes<Traits>(arguments));
  const int dot_rows = lane_vectors<Traits>(arguments.dot_vectors);
  const int step_vectors = (dot_rows + lane_vectors<Traits>(arguments.sum_vectors)) * kWarpSize;

  // The warp's slots.
  const int first_part = (block * num_warps + warp) * arguments.warp_parts;
  const int last_part = min(first_part + arguments.warp_parts, arguments.num_parts);
  const int first_slot = first_part * arguments.part_steps * kTeams;
  const int last_slot = min(last_part * arguments.part_steps * kTeams, arguments.num_selected);
  const auto num_slots = static_cast<unsigned>(max(last_slot - first_slot, 0));
  const unsigned num_steps = (num_slots + kTeams - 1) / kTeams;
  const int64_t first_entry = token * arguments.num_selected + first_slot;

  const auto dot_lane = LaneRows::of<Traits>(arguments.dot_table, arguments.dot_vectors, rank);
  const auto sum_lane = LaneRows::of<Traits>(arguments.sum_table, arguments.sum_vectors, rank);
  for (int stage = 0; stage < arguments.stages; ++stage) {
    uint4* place = ring + stage * step_vectors + lane;
    clear_behind_row<Traits>(place, arguments.dot_vectors, rank);
    clear_behind_row<Traits>(place + dot_rows * kWarpSize, arguments.sum_vectors, rank);
  }

  wait_for_prerequisite_grid();
  release_dependent_grid();
  pass.begin();
  auto request = pass.request(first_entry + lane, static_cast<unsigned>(lane) < num_slots);
  float input[kVectors][kElements] = {};
  int cores[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int vector = v * kLanes + rank;
    if (vector < arguments.dot_vectors) {
      load_elements(arguments.input, dtype, (token * arguments.dot_vectors + vector) * kElements,
                    input[v]);
    }
    cores[v] = 0;  // that of the last slice beyond the row's end, where nothing is added
#pragma unroll
    for (int c = 1; c < kMaxNumCores; ++c) {
      if (c < arguments.num_cores && vector >= c * arguments.slice_vectors) cores[v] = c;
    }
    // Kept, rather than worked out for every slot once more.
    asm("" : "+r"(cores[v]));
  }
  if (arguments.dot_scale != nullptr) {
    const auto scale = static_cast<float>(*arguments.dot_scale);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) input[v][j] *= scale;
    }
  }

  float sum[kVectors][kElements] = {};
  const int place_quads = part_quads<Traits>(arguments.sum_vectors);
  float4* place = sums + warp * arguments.warp_places * place_quads + team * (place_quads / kTeams);
  if (arguments.adds_groups && arguments.group_parts > 1) place += place_quads;
  int steps_left = arguments.part_steps;  // of the part
  int in_place = 0;                       // parts that the place has
  bool adds_to_all = false;               // groups there are

  for (unsigned ahead = 0; ahead < num_steps + kStages; ++ahead) {
    if (ahead >= kStages) {
      const unsigned step = ahead - kStages;
      cp_async_wait<kStages - 1>();
      const unsigned i = step * kTeams + team;
      const Batch& batch = batches[i / kBatch % 2];
      const uint4* rows = ring + step % kStages * step_vectors + lane;
      float dots[kVectors] = {};
      uint4 row[kVectors];
      load_row<Traits>(rows, arguments.dot_vectors, row);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v * kLanes >= arguments.dot_vectors) break;
        float odd = 0;
#pragma unroll
        for (int j = 0; j < kElements; j += 2) {
          dots[v] = fmaf(element<TableT>(row[v], j), input[v][j], dots[v]);
          odd = fmaf(element<TableT>(row[v], j + 1), input[v][j + 1], odd);
        }
        dots[v] += odd;
      }
      float weights[kVectors];
      pass.template weigh<Traits>(dots, cores, batch, i % kBatch, first_entry + i, i < num_slots,
                                  rank, weights);
      load_row<Traits>(rows + dot_rows * kWarpSize, arguments.sum_vectors, row);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v * kLanes >= arguments.sum_vectors) break;
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          sum[v][j] = fmaf(weights[v], element<TableT>(row[v], j), sum[v][j]);
        }
      }
      if (--steps_left == 0 || step + 1 == num_steps) {
        steps_left = arguments.part_steps;
        const bool adds = in_place > 0;
        const bool ends = ++in_place == arguments.place_parts || step + 1 == num_steps;
        const bool goes_to_all = arguments.adds_groups && ends;
        float4* all = arguments.group_parts > 1 ? place - place_quads : place;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (v * kLanes >= arguments.sum_vectors) break;
#pragma unroll
          for (int q = 0; q < Traits::kQuads; ++q) {
            const int at = quad_of<Traits>(v, rank) + q * kLanes;
            float quad[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) quad[j] = sum[v][4 * q + j];
            if (adds) add_quad(quad, place[at]);
            if (goes_to_all && adds_to_all) add_quad(quad, all[at]);
            (goes_to_all ? all : place)[at] = {quad[0], quad[1], quad[2], quad[3]};
          }
#pragma unroll
          for (int j = 0; j < kElements; ++j) sum[v][j] = 0;
        }
        if (ends) {
          in_place = 0;
          adds_to_all = true;
          if (!arguments.adds_groups) place += place_quads;
        }
      }
    }
    if (ahead < num_steps) {
      const unsigned i = ahead * kTeams;
      if (i % kBatch == 0) {
        __syncwarp();  // the batch before the last has been read
        pass.settle(request, batches[i / kBatch % 2], lane, first_entry + i + lane,
                    i + lane < num_slots);
        const unsigned next = i + kBatch + lane;
        request = pass.request(first_entry + next, next < num_slots);
        __syncwarp();
      }
      const uint32_t slot = batches[i / kBatch % 2].slots[(i + team) % kBatch];
      const uint32_t to = shared_address(ring + ahead % kStages * step_vectors + lane);
      request_row<Traits>(dot_lane, slot, to);
      request_row<Traits>(sum_lane, slot, to + dot_rows * kWarpSize * 16);
    }
    cp_async_commit();  // a group a step, even an empty one: the wait above counts them
  }

  if (block == 0) pass.finish(token);
  if (arguments.sum_vectors == 0) return;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (arguments.token_blocks > 1) {
    cluster_sync();
    store_sum<Traits>(arguments, sums, num_warps * arguments.warp_places, dtype, token, block);
    // Nobody leaves before the others have read its sums. The output may still be on its way.
    __syncthreads();
    cluster_arrive_relaxed();
    cluster_wait();
    return;
  }
#endif
  __syncthreads();
  store_sum<Traits>(arguments, sums, num_warps * arguments.warp_places, dtype, token, block);
}

// Host ------------------------------------------------------------------------------------------

inline constexpr int kMaxRowBytes = 4096;
// A token's parts: at most so many, and bytes for the sums of all of them.
inline constexpr int kMaxParts = 32;
inline constexpr int kMaxPartBytes = 96 * 1024;
inline constexpr int kMinPartSteps = 2;
inline constexpr int kMaxGroups = 8;
// From so many tokens a multiprocessor on, a warp takes a token.
inline constexpr int kWarpTokens = 6;
// Of fewer, two find room on a multiprocessor at once if their blocks have so many warps then.
inline constexpr int kMinRoomWarps = 5;
// Bytes of rows that a block should have, at least, before a token is shared by more of them.
inline constexpr int kMinBlockBytes = 24 * 1024;

// Whether the kernel is for these parameters. `values_beside` and `pre_values_beside` are the
// tensors of the other dtype that are read or written along with the tables.
inline bool takes_one_pass(const ValueFfnParams& params, const void* values_beside,
                           const void* pre_values_beside) {
  const int64_t longest = std::max(params.value_dim, params.pre_value_dim);
  return params.num_selected > 0 && params.addressing.rows_in_memory() < int64_t{kNoSlot} &&
         (params.sum_groups || params.addressing.expand == 1) &&
         longest * element_size(params.table_dtype) <= kMaxRowBytes &&
         values_are_vectors(params, values_beside) &&
         (params.pre_values == nullptr || pre_values_are_vectors(params, pre_values_beside));
}

// The tables by their role are left to the caller.
template <typename TableT>
SlotArguments slot_arguments(const ValueFfnParams& params) {
  SlotArguments arguments{};
  arguments.slice_vectors = static_cast<int>(params.value_dim / params.num_cores / kVector<TableT>);
  arguments.num_selected = static_cast<int>(params.num_selected);
  arguments.num_cores = params.num_cores;
  arguments.divisors = AddressDivisors<ReciprocalDivisor>(params.addressing);
  return arguments;
}

// Calls the function with the traits for rows of that length.
template <typename TableT, typename Function>
Status with_slot_traits(const SlotArguments& arguments, Function function) {
  using Short = SlotTraits<TableT, 8, 3>;
  using HalfWarp = SlotTraits<TableT, 16, 3>;
  using Medium = SlotTraits<TableT, 32, 3>;
  using Wide = SlotTraits<TableT, 32, 4>;
  using Long = SlotTraits<TableT, 32, 8>;
  static_assert(Long::kMaxRow * 16 == kMaxRowBytes, "no row is longer");
  const int longest = std::max(arguments.dot_vectors, arguments.sum_vectors);
  if (longest <= Short::kMaxRow) return function(Short{});
  if (longest <= HalfWarp::kMaxRow) return function(HalfWarp{});
  if (longest <= Medium::kMaxRow) return function(Medium{});
  if (longest <= Wide::kMaxRow) return function(Wide{});
  return function(Long{});
}

struct SlotLaunch {
  SlotArguments arguments;
  int num_warps;
  int64_t shared_bytes;
};

// How the slots of a token are cut into parts: by the shape alone.
template <typename Traits>
void cut_into_parts(SlotArguments& arguments) {
  const int quads = std::max(part_quads<Traits>(arguments.sum_vectors), 1);
  const int max_parts = std::clamp(kMaxPartBytes / (quads * 16), 1, kMaxParts);
  const auto steps = static_cast<int>(ceil_div(arguments.num_selected, Traits::kTeams));
  arguments.part_steps = std::max(kMinPartSteps, static_cast<int>(ceil_div(steps, max_parts)));
  arguments.num_parts = static_cast<int>(ceil_div(steps, arguments.part_steps));
  arguments.group_parts = static_cast<int>(ceil_div(arguments.num_parts, kMaxGroups));
}

// .. and these shared out over so many blocks, of at most so many warps.
template <typename Traits, typename Pass>
SlotLaunch share_out(SlotArguments arguments, int token_blocks, int max_warps) {
  const auto block_parts = static_cast<int>(ceil_div(arguments.num_parts, token_blocks));
  arguments.token_blocks = token_blocks;
  arguments.warp_parts = static_cast<int>(ceil_div(block_parts, max_warps));
  arguments.place_parts = 1;
  if (arguments.warp_parts >= arguments.group_parts) {
    // Whole groups, each in one place.
    arguments.place_parts = arguments.group_parts;
    arguments.warp_parts = static_cast<int>(ceil_div(arguments.warp_parts, arguments.group_parts)) *
                           arguments.group_parts;
  }
  const auto num_warps = static_cast<int>(ceil_div(block_parts, arguments.warp_parts));
  arguments.adds_groups = token_blocks * num_warps == 1;
  arguments.stages = std::min(kStages, arguments.warp_parts * arguments.part_steps);
  if (arguments.adds_groups) {
    arguments.warp_places = arguments.group_parts > 1 ? 2 : 1;
    arguments.token_places = 1;
  } else {
    arguments.warp_places = static_cast<int>(ceil_div(arguments.warp_parts, arguments.place_parts));
    arguments.token_places = static_cast<int>(ceil_div(arguments.num_parts, arguments.place_parts));
  }
  return {arguments, num_warps, shared_bytes<Traits, Pass>(arguments, num_warps)};
}

template <typename Traits, typename Pass>
SlotLaunch plan_slots(SlotArguments arguments, int64_t num_tokens, int num_multiprocessors,
                      int64_t max_shared_bytes, bool has_clusters) {
  cut_into_parts<Traits>(arguments);
  const SlotLaunch alone = share_out<Traits, Pass>(arguments, 1, 1);
  if (num_tokens >= kWarpTokens * num_multiprocessors) return alone;
  if (num_tokens > num_multiprocessors) {
    // Two blocks that run at once rather than in turn.
    constexpr int kReservedBytes = 1024;  // of a multiprocessor's shared memory, by each block
    for (int max_warps = Traits::kMaxWarps / 2; max_warps >= kMinRoomWarps; --max_warps) {
      const auto launch = share_out<Traits, Pass>(arguments, 1, max_warps);
      if (launch.num_warps < kMinRoomWarps) break;
      if (2 * (launch.shared_bytes + kReservedBytes) <= max_shared_bytes + kReservedBytes) {
        return launch;
      }
    }
  }

  const int64_t token_bytes =
      int64_t{arguments.num_selected} * 16 * (arguments.dot_vectors + arguments.sum_vectors);
  int blocks = 1;
  while (has_clusters && arguments.sum_vectors > 0 && blocks < kPortableCluster &&
         2 * blocks <= arguments.num_parts && 4 * blocks * num_tokens <= num_multiprocessors &&
         token_bytes >= 2 * blocks * kMinBlockBytes) {
    blocks *= 2;
  }
  for (int max_warps = Traits::kMaxWarps; max_warps > 0; max_warps /= 2) {
    const auto launch = share_out<Traits, Pass>(arguments, blocks, max_warps);
    if (launch.shared_bytes <= max_shared_bytes) return launch;
  }
  return alone;
}

// `leaves_room`: for small kernels on another stream, which are what is waited for.
template <typename Traits, typename Pass, typename Params>
Status launch_slots(void (*kernel)(Params, SlotArguments), const Params& params,
                    const SlotArguments& arguments, int64_t num_tokens, bool leaves_room,
                    Stream stream) {
  int num_multiprocessors = 0, shared_limit = 0;
  ULTRAMEM_RETURN_IF_ERROR(device_attribute(cudaDevAttrMultiProcessorCount, &num_multiprocessors));
  ULTRAMEM_RETURN_IF_ERROR(
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_limit));
  cudaFuncAttributes attributes{};
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaFuncGetAttributes(&attributes, kernel));
  const SlotLaunch launch = plan_slots<Traits, Pass>(arguments, num_tokens, num_multiprocessors,
                                                     shared_limit, attributes.ptxVersion >= 90);
  // Rows pass through shared memory alone: the more of it, the more blocks. With fewer of them,
  // registers are left for others.
  constexpr int kRoomyCarveout = 65;  // percent
  const int carveout = leaves_room && launch.num_warps == 1
                           ? kRoomyCarveout
                           : static_cast<int>(cudaSharedmemCarveoutMaxShared);
  ULTRAMEM_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout));
  ULTRAMEM_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit));
  const dim3 grid(static_cast<unsigned>(num_tokens * launch.arguments.token_blocks));
  const int threads = launch.num_warps * kWarpSize;
  // Blocks that begin early and wait, one on nearly every multiprocessor, keep out what another
  // stream could do there meanwhile (a FFN beside the memory layer); alone, they gain nothing by
  // it. Few leave room, and more than that take turns anyway.
  const bool overlapping = 2 * grid.x <= static_cast<unsigned>(num_multiprocessors) ||
                           grid.x > static_cast<unsigned>(num_multiprocessors);
  if (launch.arguments.token_blocks > 1) {
    return launch_clusters_as(overlapping, kernel, grid, launch.arguments.token_blocks, threads,
                              static_cast<int>(launch.shared_bytes), stream, params,
                              launch.arguments);
  }
  if (overlapping) {
    return launch_with_carveout(carveout, kernel, grid, threads, launch.shared_bytes, stream,
                                params, launch.arguments);
  }
  kernel<<<grid, threads, static_cast<size_t>(launch.shared_bytes), stream>>>(params,
                                                                              launch.arguments);
  return launch_status();
}

}  // namespace ultramem::cuda::value_ffn
