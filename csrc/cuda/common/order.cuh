// Keys by which tokens and experts are ranked: float32 values as unsigned numbers of the same order.
#pragma once

#include "common/ptx.cuh"

// Larger for the larger x and, of equal ones (-0 equals 0), for the lower id; above 0 for every x, NaN included.
DEVICE uint64_t order_key(float x, int id) {
    const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - id);
}

// The x of a key.
DEVICE float key_value(uint64_t key) {
    const uint32_t ordered = key >> 32;
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
