// The warps of product_key_topk_fwd_split.cu that select: they bound the best keys of their tokens,
// and write those that pass to lists in memory.
#pragma once

#include "product_key_split.cuh"

namespace ultramem::cuda::split {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A warp that selects: 16 tokens, of which a thread has scores as in candidate_lists.
template <int kBoxes>
class Selector {
 public:
  __device__ Selector(const ProductKeyTopkParams& p, const Shared<kBoxes>& shared,
                      const Rounds (&rounds)[2], const Candidates<kBlocks, true>& candidates,
                      int warp, int lane)
      : p_(p),
        rounds_(rounds),
        candidates_(candidates),
        shared_(shared),
        there_(shared.part_there(0, warp)),
        block_(static_cast<int>(cluster_rank())),
        lane_(lane) {
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      scores_[r] = shared.part(0, warp, r ^ block_) + lane * 16;
    }
    if (lane == 0) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) expect(slot);
      expect_bounds();
      expect_counts();
    }
  }

  // Both rounds of a work. Of the warp's tokens, which begin there in the chunk, there are
  // `num_tokens`.
  __device__ __forceinline__ void run(int head_side, int first_chunk_token, int num_tokens) {
    set_word(kFirstRow, static_cast<int>(candidates_.row(head_side, first_chunk_token)));
    set_word(kNumTokens, num_tokens);
    const auto* vector = static_cast<const float*>(head_side % 2 == 0 ? p_.u : p_.t);
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) filter_[r] = vector[head_side / 2 * kPlanes + r];
    const int first_own = block_ * kOwnKeys;
    const auto num_keys = static_cast<int>(p_.num_keys);
    bool crowded[kRows];
    {
      Maxima<kColumns> maxima;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < num_row_scores(kColumns) / 2; ++i) {
          maxima[row][i] = __float2bfloat162_rn(minus_infinity());
        }
      }
#pragma unroll 1
      for (int i = 0, first = rounds().first; i < first; i += 2) {
        take_tile_maxima<0>(maxima);
        if (i + 1 == first) break;
        take_tile_maxima<1>(maxima);
      }
      set_exist();
      float log_above[kRows];
      const int least = (rounds().least + block_) / kBlocks;
      find_bounds<kColumns>(maxima, least, least_, log_above);
      // Lists would hardly have room where half as many again are above.
      const float log_many = log2_fast(1.5f * static_cast<float>(least) + 4.0f);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        crowded[row] = (exist_ & kRowBits << 2 * row) != 0 && log_above[row] > log_many;
      }
    }
    check_counts();
    const uint32_t parity = word(kTurn) / 2 & 1;
    const bool are_crowded = exchange_bounds(crowded, parity);
#pragma unroll
    for (int row = 0; row < kRows; ++row) first_place_[row] = list(lane_ / 4 + 8 * row);
    counts_ = 0;
    const bool meets = are_crowded && num_keys > kLastMeeting * kKeys;
    int end = first_own + (meets ? kFirstMeeting * kKeys : num_keys);
    bool met = false;  // to some end for all tokens of the warp
    int key = first_own;
#pragma unroll 1
    while (true) {
#pragma unroll 1
      for (; key < end; key += kKeys) {
        add<0>(key, num_keys);
        add<1>(key + kPartKeys, num_keys);
        ++tile_;
      }
      if (key >= first_own + num_keys) break;
      const bool is_first = key < kLastMeeting * kKeys;
      met = meet(met, parity ^ (is_first ? 1 : 0));
      end = first_own + (is_first ? kLastMeeting * kKeys : num_keys);
    }
    const int first = word(kFirstRow);
    if (lane_ % 4 == 0) {
      int32_t* counts = candidates_.counts + int64_t{kBlocks} * (first + lane_ / 4) + block_;
      counts[0] = counts_ & 0xffffu;
      counts[8 * kBlocks] = counts_ >> 16;
    }
    send_counts();
  }

  // The work that is taken up next, or again.
  __device__ __forceinline__ Work work() const { return Work{word(kWork)}; }
  __device__ __forceinline__ void set_work(int number) const { set_word(kWork, number); }

  // After the last work, before marks are looked at.
  __device__ __forceinline__ void finish() { check_counts(); }

  // Whether works are done again: from the end of the first time on.
  __device__ __forceinline__ bool again() const { return word(kTurn) >= kAgain; }
  __device__ __forceinline__ void begin_again() const { set_word(kTurn, word(kTurn) + kAgain); }

 private:
  static constexpr int kSlots = num_slots(kBoxes);
  // Before the tiles of these numbers. The first comes no sooner than a part that only follows when
  // this block has read what the other sent last, the other after as much; there are two, so that
  // barriers have the same parity in each work.
  static constexpr int kFirstMeeting = kSlots, kLastMeeting = kFirstMeeting + 2;
  // Score i of a part has bit i; those of the first row of a thread are these.
  static constexpr uint32_t kRowBits = 0x3333u;
  // With them, whether the bounds are certain.
  static constexpr uint32_t kExactBit = 1u << kPartScores;
  static_assert(kPartScores == 16 && kRows == 2 && score_of(1, 0) == 2 && score_of(0, 2) == 4);
  // Of score i.
  __device__ __forceinline__ static int column(int i, int lane) {
    return i / 4 * 8 + lane % 4 * 2 + i % 2;
  }

  __device__ __forceinline__ const Rounds& rounds() const { return rounds_[again() ? 1 : 0]; }

  // Added to how many works a warp has had, times two, when it begins again.
  static constexpr int kAgain = 1 << 30;

  // Among those that select.
  __device__ __forceinline__ static int warp() { return warp_number() - kWarps; }

  __device__ __forceinline__ void expect(int slot) const {
    mbarrier_expect_bytes(there_ + slot * Shared<kBoxes>::kBarrierStride, kPartBytes);
  }

  // The barriers of a warp have the same distances as those of all (Shared).
  __device__ __forceinline__ uint32_t bounds_there() const {
    return there_ + 2 * kSlots * Shared<kBoxes>::kBarrierStride;
  }
  __device__ __forceinline__ void expect_bounds() const {
    mbarrier_expect_bytes(bounds_there(), kWarpTokens * sizeof(float));
  }
  __device__ __forceinline__ uint32_t counts_there() const {
    return there_ + (2 * kSlots + 1) * Shared<kBoxes>::kBarrierStride;
  }
  __device__ __forceinline__ void expect_counts() const {
    mbarrier_expect_bytes(counts_there(), kWarpTokens * sizeof(float));
  }

  template <int kPart>
  __device__ __forceinline__ void wait() const {
    using PartTurn = Turn<kSlots, kPart>;
    mbarrier_wait_cluster(there_ + PartTurn::kSlot * Shared<kBoxes>::kBarrierStride,
                          PartTurn::parity(tile_));
  }

  // After the part was read, by loads that are complete.
  template <int kPart>
  __device__ __forceinline__ void release() const {
    constexpr int kSlot = Turn<kSlots, kPart>::kSlot;
    const uint32_t read = there_ + (kSlots + kSlot) * Shared<kBoxes>::kBarrierStride;
    mbarrier_arrive(read);
    __syncwarp();
    if (lane_ == 0) {
      expect(kSlot);
      mbarrier_arrive_in_block(address_in_block(read, block_ ^ 1));
    }
  }

  using PartScores = float[kPlanes][kPartScores];
  // Scores i to i + 3.
  template <int kPart>
  __device__ __forceinline__ void load_scores(int i, PartScores& scores) const {
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      float four[4];
      load_shared_floats(scores_[r] + Turn<kSlots, kPart>::kSlot * Shared<kBoxes>::kSlotStride +
                             i / 4 * kPacketStride,
                         four);
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[r][i + j] = four[j];
    }
  }
  template <int kPart>
  __device__ __forceinline__ void load_scores(PartScores& scores) const {
#pragma unroll
    for (int i = 0; i < kPartScores; i += 4) load_scores<kPart>(i, scores);
  }
  __device__ __forceinline__ float rank(const PartScores& scores, int i) const {
    const float of_key[kPlanes] = {scores[0][i], scores[1][i]};
    return rank_value<kPlanes>(filter_, of_key);
  }

  __device__ __forceinline__ void set_exist() {
    const int num_tokens = word(kNumTokens);
    exist_ =
        (lane_ / 4 < num_tokens ? kRowBits : 0) | (lane_ / 4 + 8 < num_tokens ? kRowBits << 2 : 0);
    if (rounds().exact) exist_ |= kExactBit;
  }
  __device__ __forceinline__ bool is_exact() const { return (exist_ & kExactBit) != 0; }
  // Bits of the scores of a part that begins with this key.
  __device__ __forceinline__ uint32_t existing(int first_key, int num_keys) const {
    uint32_t exist = exist_ & (kExactBit - 1);
    if (first_key + kPartKeys > num_keys) {
#pragma unroll
      for (int i = 0; i < kPartScores; ++i) {
        if (first_key + column(i, lane_) >= num_keys) exist &= ~(1u << i);
      }
    }
    return exist;
  }

  // To the kHalf-th half of the columns.
  template <int kHalf>
  __device__ __forceinline__ void take_tile_maxima(Maxima<kColumns>& maxima) {
    take_maxima<kParts * kHalf, 0>(maxima);
    take_maxima<kParts * kHalf + 1, 1>(maxima);
    ++tile_;
  }

  // To the kSet-th quarter of the columns.
  template <int kSet, int kPart>
  __device__ __forceinline__ void take_maxima(Maxima<kColumns>& maxima) const {
    wait<kPart>();
    float ranks[kPartScores];
    {
      PartScores scores;
#pragma unroll
      for (int i = 0; i < kPartScores; i += 4) {
        load_scores<kPart>(i, scores);
#pragma unroll
        for (int j = i; j < i + 4; ++j) ranks[j] = rank(scores, j);
      }
    }
    wait_for_words(__float_as_uint(ranks[0]), __float_as_uint(ranks[4]), __float_as_uint(ranks[8]),
                   __float_as_uint(ranks[12]));
    release<kPart>();
#pragma unroll
    for (int i = 0; i < kPartScores; i += 2) {
      // Of a NaN and a number, the number.
      __nv_bfloat162& both = maxima[i / 2 % 2][kSet * kPartScores / 4 + i / 4];
      both = __hmax2(both, __floats2bfloat162_rn(ranks[i], ranks[i + 1]));
    }
  }

  // Of both rows, a number of this block for one of the other, to the same place there.
  __device__ __forceinline__ void exchange(uint32_t place, uint32_t parity,
                                           const uint32_t (&own)[kRows],
                                           uint32_t (&others)[kRows]) const {
    if (lane_ % 4 == 0) {
      const uint32_t other_block = block_ ^ 1;
      const uint32_t to = address_in_block(place + lane_ / 4 * 4, other_block);
      const uint32_t barrier = address_in_block(bounds_there(), other_block);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        store_async(to + 8 * row * sizeof(float), __uint_as_float(own[row]), barrier);
      }
    }
    mbarrier_wait_cluster(bounds_there(), parity);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      others[row] = load_shared_u32(place + (lane_ / 4 + 8 * row) * 4);
    }
    __syncwarp();
    if (lane_ == 0) expect_bounds();
  }

  // The lesser of both blocks' bounds, or their mean. Returns whether one of them says of any of
  // the warp's tokens that it is crowded: many more maxima than asked for are above, as where many
  // are equal.
  __device__ __forceinline__ bool exchange_bounds(const bool (&crowded)[kRows], uint32_t parity) {
    // The last bit of bounds, which are numbers of bfloat16, is free.
    uint32_t own[kRows], others[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      own[row] = __float_as_uint(least_[row]) | static_cast<uint32_t>(crowded[row]);
    }
    exchange(shared_.bounds(warp()), parity, own, others);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float other = __uint_as_float(others[row] & ~1u);
      // The same number in both blocks: what is above it in the one would be counted, and could be
      // left out in the other. Not -0, which a +0 would be above.
      const float mean = 0.5f * __fadd_rn(least_[row], other) + 0.0f;
      least_[row] = is_exact() ? fminf(least_[row], other) : mean;
    }
    return __any_sync(kFullMask, ((own[0] | own[1] | others[0] | others[1]) & 1) != 0);
  }

  // Both blocks are told how many keys of each token are in this one's list; what the other has is
  // not waited for until bounds are exchanged again. Of a token that does not exist, enough.
  __device__ __forceinline__ void send_counts() const {
    const uint32_t own = shared_.counts(warp()) + lane_;
    const uint32_t barrier = address_in_block(counts_there(), block_ ^ 1);
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const bool exists = (exist_ & kRowBits << 2 * row) != 0;
        const uint32_t found = exists ? count(row) : p_.axis_topk;
        const uint32_t place = own + 8 * row * sizeof(float);
        store_shared_u32(place + Shared<kBoxes>::kCountsToOwn, found);
        store_async(address_in_block(place, block_ ^ 1), __uint_as_float(found), barrier);
      }
    }
    set_word(kTurn, word(kTurn) + 3);
  }

  // Marks the work before, if there was one, where a token's lists in both blocks have less than m
  // keys: its bound was too high.
  __device__ __forceinline__ void check_counts() const {
    const int last = word(kTurn);
    if (last % 2 == 0) return;
    mbarrier_wait_cluster(counts_there(), (last / 2 & 1) ^ 1);
    const uint32_t place = shared_.counts(warp()) + lane_ % kWarpTokens * 4;
    const uint32_t found =
        load_shared_u32(place) + load_shared_u32(place + Shared<kBoxes>::kCountsToOwn);
    const bool is_short = __any_sync(kFullMask, found < static_cast<uint32_t>(p_.axis_topk));
    if (last < kAgain) tell_state(Work{last / 2 - 1}.index(), is_short);
    if (lane_ == 0) {
      // Done again, by a bound that is certain, it is not short.
      if (is_short && last < kAgain) shared_.mark(last / 2 - 1);
      expect_counts();
    }
    set_word(kTurn, last - 1);
  }

  // Whether the warp's lists of a work are complete or will be filled again.
  __device__ __forceinline__ void tell_state(int work, bool is_short) const {
    static_assert(kWarpTokens == EarlyWorks::kGroupTokens && kTokens == kWorkTokens);
    if (work >= candidates_.early.count) return;
    int32_t* state = candidates_.early.of_work(work, kBlocks) + warp() * kBlocks + block_;
    const int32_t value = is_short ? EarlyWorks::kLate : EarlyWorks::kComplete;
    __syncwarp();  // what other lanes have written
    if (lane_ == 0) {
      asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(state), "r"(value) : "memory");
    }
  }

  // Words of the warp: how many works it has had, times two, one more while it has not looked at
  // what the other block has found in the last; of the work's candidates the row of the first
  // token, and how many tokens there are from that one on; the work's number. In shared memory, for
  // they are seldom needed.
  enum Word { kTurn, kFirstRow, kNumTokens, kWork };
  static_assert(kWarpWords == 4);
  __device__ __forceinline__ int word(Word which) const {
    return static_cast<int>(load_shared_u32(shared_.words(warp()) + 4 * which));
  }
  __device__ __forceinline__ void set_word(Word which, int value) const {
    const uint32_t place = shared_.words(warp()) + 4 * which;
    __syncwarp();
    if (lane_ == 0) store_shared_u32(place, value);
    __syncwarp();
  }

  // Between two tiles. Where each block's list of a token has m/2 keys, m keys are not below the
  // least rank in both, and later ones must be above it: of many equal keys lists take few more.
  // Returns whether the bounds of all tokens rose, which need not be looked at again.
  __device__ __forceinline__ bool meet(bool met, uint32_t parity) {
    __syncwarp();  // what other lanes have written
    uint32_t own[kRows], others[kRows];
#pragma unroll 1  // seldom needed: little code
    for (int row = 0; row < kRows; ++row) {
      (row == 0 ? own[0] : own[1]) = met ? 0 : least_in_list(row);
    }
    exchange(shared_.least(warp()), parity, own, others);
    bool rise = true;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const uint32_t rank = min(own[row], others[row]);
      rise &= rank != 0;
      if (rank != 0) least_[row] = fmaxf(least_[row], above_rank(rank));
    }
    return __all_sync(kFullMask, rise);
  }

  // As a sortable rank; 0 where the list has fewer than m/2 keys or a NaN.
  __device__ __forceinline__ uint32_t least_in_list(int row) const {
    constexpr int kBatch = 8;
    const auto num = static_cast<int>(count(row));
    const int first_place = row == 0 ? first_place_[0] : first_place_[1];
    uint32_t least = 0;
    if (2 * num >= p_.axis_topk) {
      least = 0xffffffffu;
#pragma unroll 1
      for (int first = lane_ % 4; first < num; first += 4 * kBatch) {
        float scores[kBatch][kPlanes];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          load_candidate(candidates_, int64_t{first_place + min(first + 4 * i, num - 1)},
                         scores[i]);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          least = min(least, sortable(rank_value<kPlanes>(filter_, scores[i])));
        }
      }
    }
    __syncwarp();
    least = min(least, __shfl_xor_sync(kFullMask, least, 1));
    return min(least, __shfl_xor_sync(kFullMask, least, 2));
  }

  // Bits of the scores of a part that a bound lets pass: a certain one what is not below it; a
  // guessed one what is above it. NaN is neither below nor above: it may have to be among the best
  // where numbers are few, but must not count for one where a guess left numbers out.
  __device__ __forceinline__ uint32_t passing(const PartScores& scores) const {
    uint32_t signs = 0;
    if (is_exact()) {
#pragma unroll
      for (int i = kPartScores - 1; i >= 0; --i) {
        signs = __funnelshift_l(__float_as_uint(rank(scores, i) - least_[i / 2 % 2]), signs, 1);
      }
      return ~signs;
    }
#pragma unroll
    for (int i = kPartScores - 1; i >= 0; --i) {
      signs = __funnelshift_l(__float_as_uint(least_[i / 2 % 2] - rank(scores, i)), signs, 1);
    }
    return signs;
  }
  // The bound that only what is above this sortable rank passes. Above infinity there is no number,
  // which is ignored, and every number is above NaN.
  __device__ __forceinline__ float above_rank(uint32_t rank) const {
    if (!is_exact()) return value_of(rank) + 0.0f;
    return rank == 0 ? least_rank(0) : fmaxf(least_rank(rank), least_rank(rank + 1));
  }

  __device__ __forceinline__ int capacity() const { return candidates_.capacities[0]; }
  __device__ __forceinline__ uint32_t count(int row) const { return counts_ >> 16 * row & 0xffffu; }
  // Where the list of a token of the warp begins.
  __device__ __forceinline__ int list(int warp_token) const {
    return (word(kFirstRow) + warp_token) * candidates_.capacity() + candidates_.before(block_);
  }

  // Adds the keys of a part to the lists.
  template <int kPart>
  __device__ __forceinline__ void add(int first_key, int num_keys) {
    const auto safe = static_cast<uint32_t>(capacity() - kPartKeys);
    const bool has_room = __all_sync(kFullMask, count(0) <= safe && count(1) <= safe);
    const uint32_t exist = existing(first_key, num_keys);
    wait<kPart>();
    if (!has_room) make_room<kPart>(exist);
    PartScores scores;
    load_scores<kPart>(scores);
    wait_for_words(__float_as_uint(scores[0][0]), __float_as_uint(scores[1][0]),
                   __float_as_uint(scores[0][4]), __float_as_uint(scores[1][4]),
                   __float_as_uint(scores[0][8]), __float_as_uint(scores[1][8]),
                   __float_as_uint(scores[0][12]), __float_as_uint(scores[1][12]));
    release<kPart>();
    const uint32_t taken = exist & passing(scores);
    const QuadCounts counts(taken & kRowBits, taken & kRowBits << 2, lane_);
    write(taken, counts_ + counts.before, first_key, scores);
    counts_ += counts.all;
  }

  // Writes keys of a part to the lists, the first of each row to this place of the list. With a
  // predicate to each score's store, in which few lanes take part, this takes no longer than to
  // look for the keys of each lane, and needs the part no more.
  __device__ __forceinline__ void write(uint32_t taken, uint32_t places, int first_key,
                                        const PartScores& scores) const {
    uint32_t to[kRows] = {first_place_[0] + (places & 0xffffu), first_place_[1] + (places >> 16)};
    const auto first_id = static_cast<uint32_t>(first_key + column(0, lane_));
#pragma unroll
    for (int i = 0; i < kPartScores; ++i) {
      store_record_if(taken & 1u << i, candidates_, to[i / 2 % 2], scores[0][i], scores[1][i],
                      first_id + column(i, 0));
    }
  }

  // Cuts lists in which a part's keys would not find room down to their best m. `exist`: bits of
  // the part's scores.
  template <int kPart>
  __device__ __forceinline__ void make_room(uint32_t exist) {
    const auto m = static_cast<uint32_t>(p_.axis_topk);
    const auto most = static_cast<uint32_t>(capacity());
    uint32_t later;  // counts
    {
      PartScores scores;
      load_scores<kPart>(scores);
      const uint32_t taken = exist & passing(scores);
      later = counts_ + QuadCounts(taken & kRowBits, taken & kRowBits << 2, lane_).all;
    }
    if (__all_sync(kFullMask, (later & 0xffffu) <= most && later >> 16 <= most)) return;
    __syncwarp();  // what other lanes have written
#pragma unroll 1
    for (int token = 0; token < kWarpTokens; ++token) {
      const int row = token / 8;
      const uint32_t num = __shfl_sync(kFullMask, counts_, token % 8 * 4) >> 16 * row & 0xffffu;
      const uint32_t num_later = __shfl_sync(kFullMask, later, token % 8 * 4) >> 16 * row & 0xffffu;
      if (num_later <= most) continue;
      const IdCut cut =
          cut_list(p_, candidates_, int64_t{list(token)}, static_cast<int>(num), filter_, lane_);
      if (lane_ / 4 != token % 8) continue;
      // Later keys of equal rank, which have higher ids, have lost.
      const float least = above_rank(cut.rank);
      if (row == 0) {
        least_[0] = fmaxf(least_[0], least);
        counts_ = (counts_ & 0xffff0000u) | m;
      } else {
        least_[1] = fmaxf(least_[1], least);
        counts_ = (counts_ & 0xffffu) | m << 16;
      }
    }
    __syncwarp();
  }

  const ProductKeyTopkParams& p_;
  const Rounds (&rounds_)[2];
  const Candidates<kBlocks, true>& candidates_;
  Shared<kBoxes> shared_;
  uint32_t there_;            // the barrier of the first slot
  uint32_t scores_[kPlanes];  // of a part in the first slot, this lane's
  float filter_[kPlanes];
  float least_[kRows];
  uint32_t exist_;  // bits of rows with a token, and kExactBit
  int block_;       // this one's number in the cluster
  int lane_;
  uint32_t first_place_[kRows];  // of lists
  int tile_ = 0;                 // of all rounds so far
  uint32_t counts_;              // what is in the lists of both rows, in halves of a word
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace ultramem::cuda::split
