// Everything at once.
#pragma once

#include "ultramem/addressing.h"
#include "ultramem/device_info.h"
#include "ultramem/product_key_topk.h"
#include "ultramem/rms_norm.h"
#include "ultramem/table_factors.h"
#include "ultramem/table_update.h"
#include "ultramem/tucker_filter.h"
#include "ultramem/tucker_query.h"
#include "ultramem/types.h"
#include "ultramem/value_ffn.h"
#include "ultramem/value_slots.h"
#include "ultramem/version.h"
