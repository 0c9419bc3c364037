// Whether kernels that need sm_90a (wgmma, TMA) may run: this build has them and the current device
// is of that architecture, which is not forward-compatible.
#pragma once

#include "device.h"

namespace ultramem::cuda {

inline bool sm90a_available() {
#if defined(ULTRAMEM_WITH_SM90A)
  return compute_capability() == 90;
#else
  return false;
#endif
}

}  // namespace ultramem::cuda
