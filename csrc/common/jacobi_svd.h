// Singular value decomposition of a tiny matrix, the same code on host and device.
//
// One-sided Jacobi (Hestenes): rotate pairs of columns of B = A until all are orthogonal; then
// B = U diag(sigma), and the accumulated rotations are V. Everything is float64, so that backends
// whose last bits differ still round to the same float32.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define ULTRAMEM_SVD_FUNCTION __host__ __device__ inline
#else
#define ULTRAMEM_SVD_FUNCTION inline
#endif
// On the device the matrices must stay in registers; host compilers do not know the pragma.
#if defined(__CUDA_ARCH__)
#define ULTRAMEM_SVD_UNROLL _Pragma("unroll")
#else
#define ULTRAMEM_SVD_UNROLL
#endif

namespace ultramem {

// A = left diag(sigma) right^T with sigma descending; column i of left and right belongs to
// sigma_i. Signs are canonical: see canonical_sign(); right's follow left's.
template <int R>
struct Svd {
  double left[R][R];
  double sigma[R];
  double right[R][R];
};

namespace svd_detail {

// Convergence is quadratic: 4 x 4 takes five or six sweeps. The bound is for NaN.
constexpr int kMaxSweeps = 12;
// Columns whose cosine is below this are orthogonal as far as float64 can tell.
constexpr double kOrthogonal = 1e-15;
// Relative to sigma_0, a singular value below this is rounding noise and so is its left vector.
constexpr double kNoise = 1e-15;
// Below this a sum or a component of a unit vector is a zero that rounding has touched.
constexpr double kNegligible = 1e-9;

// One sweep over all pairs; true if a pair was rotated.
template <int R>
ULTRAMEM_SVD_FUNCTION bool sweep(double (&b)[R][R], double (&v)[R][R]) {
  bool rotated = false;
  ULTRAMEM_SVD_UNROLL
  for (int p = 0; p < R - 1; ++p) {
    ULTRAMEM_SVD_UNROLL
    for (int q = p + 1; q < R; ++q) {
      double pp = 0, qq = 0, pq = 0;
      ULTRAMEM_SVD_UNROLL
      for (int i = 0; i < R; ++i) {
        pp += b[i][p] * b[i][p];
        qq += b[i][q] * b[i][q];
        pq += b[i][p] * b[i][q];
      }
      if (fabs(pq) <= kOrthogonal * sqrt(pp) * sqrt(qq)) continue;
      rotated = true;
      // The smaller of the two rotations that make the columns orthogonal.
      const double zeta = (qq - pp) / (2 * pq);
      const double tangent = (zeta >= 0 ? 1.0 : -1.0) / (fabs(zeta) + sqrt(1 + zeta * zeta));
      const double cosine = 1 / sqrt(1 + tangent * tangent);
      const double sine = cosine * tangent;
      ULTRAMEM_SVD_UNROLL
      for (int i = 0; i < R; ++i) {
        const double bp = b[i][p], vp = v[i][p];
        b[i][p] = cosine * bp - sine * b[i][q];
        b[i][q] = sine * bp + cosine * b[i][q];
        v[i][p] = cosine * vp - sine * v[i][q];
        v[i][q] = sine * vp + cosine * v[i][q];
      }
    }
  }
  return rotated;
}

template <int R>
ULTRAMEM_SVD_FUNCTION void swap_columns(double (&a)[R][R], int p, int q) {
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R; ++i) {
    const double x = a[i][p];
    a[i][p] = a[i][q];
    a[i][q] = x;
  }
}

// Replaces column `column` of `left` by a unit vector orthogonal to the columns before it: the
// unit vector e_k that they represent worst, made orthogonal. Those before it are orthonormal.
template <int R>
ULTRAMEM_SVD_FUNCTION void complete_column(double (&left)[R][R], int column) {
  // |e_k minus its projection|^2 = 1 - sum_j left[k][j]^2.
  double best_residual = -1;
  double unit[R] = {};
  ULTRAMEM_SVD_UNROLL
  for (int k = 0; k < R; ++k) {
    double residual = 1;
    ULTRAMEM_SVD_UNROLL
    for (int j = 0; j < R; ++j) {
      if (j < column) residual -= left[k][j] * left[k][j];
    }
    // The margin keeps rounding from choosing between equally good vectors.
    if (residual > best_residual + kNegligible) {
      best_residual = residual;
      ULTRAMEM_SVD_UNROLL
      for (int i = 0; i < R; ++i) unit[i] = i == k ? 1 : 0;
    }
  }
  // Twice is enough for orthogonality to the last bit.
  for (int pass = 0; pass < 2; ++pass) {
    ULTRAMEM_SVD_UNROLL
    for (int j = 0; j < R; ++j) {
      if (j >= column) continue;
      double projection = 0;
      ULTRAMEM_SVD_UNROLL
      for (int i = 0; i < R; ++i) projection += unit[i] * left[i][j];
      ULTRAMEM_SVD_UNROLL
      for (int i = 0; i < R; ++i) unit[i] -= projection * left[i][j];
    }
  }
  double norm = 0;
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R; ++i) norm += unit[i] * unit[i];
  norm = sqrt(norm);
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R; ++i) left[i][column] = unit[i] / norm;
}

// +1 or -1, so that the column times it has a sum >= 0 or, where the sum vanishes, a first
// component that does not vanish > 0. Rounding must not choose the sign of (1, -1) / sqrt(2).
template <int R>
ULTRAMEM_SVD_FUNCTION double canonical_sign(const double (&a)[R][R], int column) {
  double sum = 0;
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R; ++i) sum += a[i][column];
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R; ++i) {
    if (fabs(sum) <= kNegligible) sum = a[i][column];
  }
  return sum < 0 ? -1 : 1;
}

}  // namespace svd_detail

// Any finite matrix, whatever its rank and scale. A NaN or an infinity makes every output NaN.
template <int R>
ULTRAMEM_SVD_FUNCTION Svd<R> jacobi_svd(const double (&a)[R][R]) {
  Svd<R> svd;
  double largest = 0, poison = 0;
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R; ++i) {
    ULTRAMEM_SVD_UNROLL
    for (int j = 0; j < R; ++j) {
      largest = fmax(largest, fabs(a[i][j]));
      poison += a[i][j] * 0.0;  // NaN unless every element is finite
    }
  }
  // Scaled by a power of two to [0.5, 1), squares neither overflow nor lose the leading column.
  int exponent = 0;
  if (poison == 0.0) frexp(largest, &exponent);
  double (&b)[R][R] = svd.left;
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R; ++i) {
    ULTRAMEM_SVD_UNROLL
    for (int j = 0; j < R; ++j) {
      b[i][j] = ldexp(a[i][j], -exponent) + poison;
      svd.right[i][j] = i == j ? 1 : 0;
    }
  }
  for (int i = 0; i < svd_detail::kMaxSweeps; ++i) {
    if (!svd_detail::sweep<R>(b, svd.right)) break;
  }

  ULTRAMEM_SVD_UNROLL
  for (int j = 0; j < R; ++j) {
    double norm = 0;
    ULTRAMEM_SVD_UNROLL
    for (int i = 0; i < R; ++i) norm += b[i][j] * b[i][j];
    svd.sigma[j] = sqrt(norm);
  }
  // Bubble sort: indices known at compile time keep the matrices in registers.
  ULTRAMEM_SVD_UNROLL
  for (int pass = 0; pass < R - 1; ++pass) {
    ULTRAMEM_SVD_UNROLL
    for (int j = 0; j < R - 1 - pass; ++j) {
      if (svd.sigma[j] < svd.sigma[j + 1]) {
        const double sigma = svd.sigma[j];
        svd.sigma[j] = svd.sigma[j + 1];
        svd.sigma[j + 1] = sigma;
        svd_detail::swap_columns<R>(b, j, j + 1);
        svd_detail::swap_columns<R>(svd.right, j, j + 1);
      }
    }
  }
  ULTRAMEM_SVD_UNROLL
  for (int j = 0; j < R; ++j) {
    if (svd.sigma[j] <= svd_detail::kNoise * svd.sigma[0]) {
      svd_detail::complete_column<R>(svd.left, j);
    } else {
      ULTRAMEM_SVD_UNROLL
      for (int i = 0; i < R; ++i) svd.left[i][j] /= svd.sigma[j];
    }
    const double sign = svd_detail::canonical_sign<R>(svd.left, j);
    ULTRAMEM_SVD_UNROLL
    for (int i = 0; i < R; ++i) {
      svd.left[i][j] *= sign;
      svd.right[i][j] = svd.right[i][j] * sign + poison;
    }
  }
  ULTRAMEM_SVD_UNROLL
  for (int j = 0; j < R; ++j) svd.sigma[j] = ldexp(svd.sigma[j], exponent);
  return svd;
}

}  // namespace ultramem
