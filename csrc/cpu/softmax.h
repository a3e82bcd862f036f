// Softmax of a row of scores, a block of keys after another.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vec.h"

constexpr float NONE = -std::numeric_limits<float>::infinity();  // the largest of no scores

// softcap * tanh(x / softcap), by 1 - 2t / (1 + t) with t = e^-2|x / softcap|.
inline f32x16 capped(f32x16 x, float softcap) {
    const f32x16 u = x / softcap, t = exp16(where(u > 0.0f, u * -2.0f, u * 2.0f));
    const f32x16 size = (1.0f - t) / (1.0f + t) * softcap;
    return where(u > 0.0f, size, -size);
}

// The scores of one row at keys lo <= j < hi of a block become probabilities, relative to the largest
// score so far; elsewhere in [from, upto) they are 0. Returns what earlier sums are to be scaled by.
// softcap 0: none.
template <class T>
float softmax(float scale, float softcap, float *scores, std::int64_t lo, std::int64_t hi,
              std::int64_t from, std::int64_t upto, float &largest, float &total, T *probabilities) {
    const i32x16 lanes = lane_numbers();
    f32x16 most = splat(NONE);
    for (std::int64_t j = from; j < upto; j += 16) {
        f32x16 x = load16(scores + j) * scale;
        if (softcap != 0.0f) x = capped(x, softcap);
        if (j < lo || j + 16 > hi) {
            const i32x16 at = lanes + std::int32_t(j);
            x = where((at >= std::int32_t(lo)) & (at < std::int32_t(hi)), x, splat(NONE));
        }
        store16(scores + j, x);
        most = larger(most, x);
    }
    const float highest = std::max(largest, largest_lane(most));
    const float fix = largest == NONE ? 0.0f : std::exp(largest - highest);
    const float origin = highest == NONE ? 0.0f : highest;
    f32x16 sums = {};
    for (std::int64_t j = from; j < upto; j += 16) {  // e^0 is 1 to the last bit
        const f32x16 e = power_of_two16((load16(scores + j) - origin) * 1.44269504088896341f);
        sums += e;
        store16(probabilities + j, e);
    }
    total = total * fix + sum(sums);
    largest = highest;
    return fix;
}
