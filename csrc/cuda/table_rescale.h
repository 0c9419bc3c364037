// A table whose scale has become small: all weights times a power of two.
#pragma once

#include "ultramem/table_update.h"

namespace ultramem::cuda {

// Multiplies weight and master by *factor (on the device, from prepare_update); does nothing where
// that is 1. Before the rows are updated.
Status launch_table_rescale(const TableUpdateParams& params, const float* factor, Stream stream);

}  // namespace ultramem::cuda
