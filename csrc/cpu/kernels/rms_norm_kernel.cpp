// rms_norm, forward and backward.
#include "../arena.h"
#include "../parallel.h"
#include "kernels.h"
#include "rows.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

constexpr int64_t kRowsPerTile = 32;
// The weight's gradient is summed over pieces of rows whose length depends on the shape alone.
constexpr int64_t kMaxPieces = 256;

ULTRAMEM_ALWAYS_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
ULTRAMEM_ALWAYS_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Calls body, a generic lambda, with a value of the type of the rows and one of the weight's, which
// is the same or what rows accumulate in.
template <typename Body>
void with_types(const RmsNormParams& params, const Body& body) {
  with_type(params.dtype, [&](auto type) {
    if (params.weight_dtype == params.dtype) return body(type, type);
    body(type, AccOf<decltype(type)>{});
  });
}

template <typename T>
AccOf<T> inverse_rms(const T* x, int64_t dim, double eps) {
  using Acc = AccOf<T>;
  constexpr int kW = kLanes<Acc>;
  Vec<Acc> sum0 = {}, sum1 = {};
  int64_t i = 0;
  for (; i + 2 * kW <= dim; i += 2 * kW) {
    const Vec<Acc> a = load(x + i), b = load(x + i + kW);
    sum0 += a * a;
    sum1 += b * b;
  }
  for (; i < dim; i += kW) {
    const Vec<Acc> a = load_partial(x + i, smaller<int64_t>(kW, dim - i));
    sum0 += a * a;
  }
  const Acc mean = sum_lanes(sum0 + sum1) / static_cast<Acc>(dim);
  return Acc{1} / square_root(mean + static_cast<Acc>(eps));
}

template <typename T, typename Weight>
void normalise_row(const T* x, const Weight* weight, T* y, int64_t dim, double eps) {
  constexpr int kW = kLanes<AccOf<T>>;
  const AccOf<T> scale = inverse_rms(x, dim, eps);
  int64_t i = 0;
  for (; i + kW <= dim; i += kW) store(y + i, load(x + i) * scale * load(weight + i));
  for (; i < dim; ++i) y[i] = from_acc<T>(to_acc(x[i]) * scale * to_acc(weight[i]));
}

// With s = 1/rms: dx = s * (w*dy - x * s^2 * mean(w*dy*x)),  dw += dy * x * s.
template <typename T, typename Weight>
void backward_row(const T* x, const Weight* weight, const T* grad_y, T* grad_x,
                  AccOf<T>* grad_weight, int64_t dim, double eps) {
  using Acc = AccOf<T>;
  constexpr int kW = kLanes<Acc>;
  const Acc scale = inverse_rms(x, dim, eps);
  const int64_t whole = dim / kW * kW;
  Vec<Acc> sum = {};
  for (int64_t i = 0; i < whole; i += kW) sum += load(weight + i) * load(grad_y + i) * load(x + i);
  Acc projection = sum_lanes(sum);
  for (int64_t i = whole; i < dim; ++i) {
    projection += to_acc(weight[i]) * to_acc(grad_y[i]) * to_acc(x[i]);
  }
  const Acc along = projection / static_cast<Acc>(dim) * scale * scale;

  for (int64_t i = 0; i < whole; i += kW) {
    const Vec<Acc> xi = load(x + i), dy = load(grad_y + i);
    store(grad_x + i, (load(weight + i) * dy - xi * along) * scale);
    store(grad_weight + i, load(grad_weight + i) + dy * xi * scale);
  }
  for (int64_t i = whole; i < dim; ++i) {
    const Acc xi = to_acc(x[i]), dy = to_acc(grad_y[i]);
    grad_x[i] = from_acc<T>((to_acc(weight[i]) * dy - xi * along) * scale);
    grad_weight[i] += dy * xi * scale;
  }
}

int64_t rows_per_piece(int64_t num_rows) {
  return larger(kRowsPerTile, div_up(num_rows, kMaxPieces));
}

template <typename T, typename Weight>
void backward(const RmsNormBwdParams& params, const Executor& executor) {
  using Acc = AccOf<T>;
  const T* x = static_cast<const T*>(params.x);
  const Weight* weight = static_cast<const Weight*>(params.weight);
  const T* grad_y = static_cast<const T*>(params.grad_y);
  T* grad_x = static_cast<T*>(params.grad_x);
  const int64_t dim = params.dim;
  const int64_t piece_rows = rows_per_piece(params.num_rows);
  const int64_t num_pieces = div_up(params.num_rows, piece_rows);
  Arena arena(params.workspace);
  Acc* partial = arena.take<Acc>(num_pieces * dim);

  parallel_tiles(executor, num_pieces, [&](int64_t, int64_t piece) {
    Acc* sum = partial + piece * dim;
    set_zero(sum, dim);
    const int64_t last = smaller(params.num_rows, (piece + 1) * piece_rows);
    for (int64_t row = piece * piece_rows; row < last; ++row) {
      backward_row(x + row * dim, weight, grad_y + row * dim, grad_x + row * dim, sum, dim,
                   params.eps);
    }
  });
  for (int64_t piece = 1; piece < num_pieces; ++piece) {
    add_scaled(partial, Acc{1}, partial + piece * dim, dim);
  }
  round_to(static_cast<Weight*>(params.grad_weight), partial, dim);
}

}  // namespace

void rms_norm_fwd(const RmsNormParams& params, const Executor& executor) {
  with_types(params, [&](auto type, auto weight_type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(params.x);
    const auto* weight = static_cast<const decltype(weight_type)*>(params.weight);
    T* y = static_cast<T*>(params.y);
    parallel_tiles(executor, div_up(params.num_rows, kRowsPerTile), [&](int64_t, int64_t tile) {
      const int64_t last = smaller(params.num_rows, (tile + 1) * kRowsPerTile);
      for (int64_t row = tile * kRowsPerTile; row < last; ++row) {
        normalise_row(x + row * params.dim, weight, y + row * params.dim, params.dim, params.eps);
      }
    });
  });
}

size_t rms_norm_bwd_workspace(const RmsNormBwdParams& params, const Executor&) {
  const int64_t num_pieces = div_up(params.num_rows, rows_per_piece(params.num_rows));
  Arena arena(nullptr);
  if (params.dtype == DType::kFloat64) {
    arena.take<double>(num_pieces * params.dim);
  } else {
    arena.take<float>(num_pieces * params.dim);
  }
  return arena.bytes();
}

void rms_norm_bwd(const RmsNormBwdParams& params, const Executor& executor) {
  with_types(params, [&](auto type, auto weight_type) {
    backward<decltype(type), decltype(weight_type)>(params, executor);
  });
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
