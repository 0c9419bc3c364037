// A stable parallel bucket sort: histogram by piece of the input, scatter, then each bucket by
// itself.
#include "row_groups.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "parallel.h"

namespace ultramem::cpu {
namespace {

constexpr int kBucketBits = 11;
constexpr int kDigitBits = 8;
constexpr int64_t kEntriesPerPiece = 4096;  // below this, another thread costs more than it saves
constexpr int64_t kInsertionSortMax = 32;
constexpr int64_t kBucketsPerTile = 16;

struct Layout {
  int64_t num_pieces;
  int64_t num_buckets;
  int32_t shift;
  int64_t* bucket_begin;  // [num_buckets + 1]
  int64_t* offsets;       // [num_pieces, num_buckets], counts, then where the piece writes
  uint64_t* pairs;        // [num_entries]
  uint64_t* spare;        // [num_entries]
};

int bit_width(int64_t value) {
  int bits = 0;
  while (bits < 63 && (int64_t{1} << bits) < value) ++bits;
  return bits;
}

Layout lay_out(int64_t num_entries, int64_t num_rows, const Executor& executor, Arena* arena) {
  Layout layout;
  const int row_bits = bit_width(num_rows);
  layout.shift = std::max(0, row_bits - kBucketBits);
  layout.num_buckets = ((num_rows - 1) >> layout.shift) + 1;
  layout.num_pieces =
      std::clamp<int64_t>(num_entries / kEntriesPerPiece, 1, worker_count(executor));
  layout.bucket_begin = arena->take<int64_t>(layout.num_buckets + 1);
  layout.offsets = arena->take<int64_t>(layout.num_pieces * layout.num_buckets);
  layout.pairs = arena->take<uint64_t>(num_entries);
  layout.spare = arena->take<uint64_t>(num_entries);
  return layout;
}

void insertion_sort(uint64_t* pairs, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const uint64_t pair = pairs[i];
    int64_t hole = i;
    for (; hole > 0 && pairs[hole - 1] > pair; --hole) pairs[hole] = pairs[hole - 1];
    pairs[hole] = pair;
  }
}

// Least significant digit first over the row bits alone: entries are in order already.
void radix_sort(uint64_t* pairs, uint64_t* spare, int64_t count, int32_t row_bits) {
  uint64_t* from = pairs;
  uint64_t* to = spare;
  for (int32_t bit = 0; bit < row_bits; bit += kDigitBits) {
    int64_t begin[1 << kDigitBits] = {};
    const auto digit = [bit](uint64_t pair) {
      return (pair >> (32 + bit)) & ((uint64_t{1} << kDigitBits) - 1);
    };
    for (int64_t i = 0; i < count; ++i) ++begin[digit(from[i])];
    int64_t total = 0;
    for (int64_t& value : begin) {
      const int64_t size = value;
      value = total;
      total += size;
    }
    for (int64_t i = 0; i < count; ++i) to[begin[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != pairs) std::memcpy(pairs, from, static_cast<size_t>(count) * sizeof(uint64_t));
}

}  // namespace

size_t group_rows_workspace(int64_t num_entries, int64_t num_rows, const Executor& executor) {
  if (num_entries == 0 || num_rows == 0) return 0;
  Arena arena(nullptr);
  lay_out(num_entries, num_rows, executor, &arena);
  return arena.bytes();
}

RowGroups group_rows(const int64_t* rows, int64_t num_entries, int64_t num_rows, void* workspace,
                     const Executor& executor) {
  if (num_entries == 0 || num_rows == 0) return {nullptr, nullptr, 0, 0};
  Arena arena(workspace);
  const Layout layout = lay_out(num_entries, num_rows, executor, &arena);
  const int32_t shift = layout.shift;
  const auto piece_begin = [&](int64_t piece) { return num_entries * piece / layout.num_pieces; };

  parallel_tiles(executor, layout.num_pieces, [&](int64_t, int64_t piece) {
    int64_t* counts = layout.offsets + piece * layout.num_buckets;
    std::fill(counts, counts + layout.num_buckets, 0);
    for (int64_t e = piece_begin(piece); e < piece_begin(piece + 1); ++e) {
      if (rows[e] >= 0) ++counts[rows[e] >> shift];
    }
  });

  int64_t total = 0;
  for (int64_t bucket = 0; bucket < layout.num_buckets; ++bucket) {
    layout.bucket_begin[bucket] = total;
    for (int64_t piece = 0; piece < layout.num_pieces; ++piece) {
      int64_t& offset = layout.offsets[piece * layout.num_buckets + bucket];
      const int64_t count = offset;
      offset = total;
      total += count;
    }
  }
  layout.bucket_begin[layout.num_buckets] = total;

  parallel_tiles(executor, layout.num_pieces, [&](int64_t, int64_t piece) {
    int64_t* offsets = layout.offsets + piece * layout.num_buckets;
    const uint64_t low_mask = (uint64_t{1} << shift) - 1;
    for (int64_t e = piece_begin(piece); e < piece_begin(piece + 1); ++e) {
      if (rows[e] < 0) continue;
      const uint64_t low = static_cast<uint64_t>(rows[e]) & low_mask;
      layout.pairs[offsets[rows[e] >> shift]++] = low << 32 | static_cast<uint64_t>(e);
    }
  });

  const int64_t num_tiles = (layout.num_buckets + kBucketsPerTile - 1) / kBucketsPerTile;
  parallel_tiles(executor, shift == 0 ? 0 : num_tiles, [&](int64_t, int64_t tile) {
    const int64_t last = std::min(layout.num_buckets, (tile + 1) * kBucketsPerTile);
    for (int64_t bucket = tile * kBucketsPerTile; bucket < last; ++bucket) {
      const int64_t begin = layout.bucket_begin[bucket];
      const int64_t count = layout.bucket_begin[bucket + 1] - begin;
      if (count <= kInsertionSortMax) {
        insertion_sort(layout.pairs + begin, count);
      } else {
        radix_sort(layout.pairs + begin, layout.spare + begin, count, shift);
      }
    }
  });
  return {layout.pairs, layout.bucket_begin, layout.num_buckets, shift};
}

}  // namespace ultramem::cpu
