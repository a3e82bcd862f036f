// Activations of a gated MLP.

#pragma once

#include "vec.h"

// x / (1 + e^-x), and x times the tanh approximation of the normal distribution, which is
// x / (1 + e^-2u). Both divide by 1 + e^-|z| so that exp's argument is never positive.
template <bool GELU>
[[gnu::always_inline]] inline f32x16 gate(f32x16 x) {
    const f32x16 z = GELU ? x * 1.5957691216057308f * (1.0f + 0.044715f * x * x) : x;
    const f32x16 small = exp16(where(z > 0.0f, -z, z));
    return x * where(z > 0.0f, splat(1.0f), small) / (1.0f + small);
}
