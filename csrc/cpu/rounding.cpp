// Floats rounded to codes of 4 or 8 bits: `quantized` of minisgl/kernels/grouped_linear/weights.py, to
// the bit. Products that are added to are exact, so fusing them changes nothing.

#include <limits>

#include "model_ops.h"
#include "pool.h"

namespace {

constexpr double CLIPS[] = {1.0, 0.95, 0.9, 0.85, 0.8};
constexpr int MINIMUMS = 8;  // the lane where those begin, behind the scales

// The nearest numbers of fp16, ties to even; infinite beyond its range.
f32x16 to_half(f32x16 x) {
    const u32x16 sign = (u32x16)x & 0x80000000u, bits = (u32x16)x & 0x7fffffffu;
    const f32x16 size = (f32x16)bits;
    const f32x16 normal = (f32x16)((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
    const f32x16 small = (size + 0.5f) - 0.5f;  // multiples of 2^-24
    const f32x16 kept = where(size < 0x1p-14f, small, normal);
    const f32x16 infinite = splat(std::numeric_limits<float>::infinity());
    return (f32x16)((u32x16)where(size >= 65520.0f, infinite, kept) | sign);
}

f32x16 nearest(f32x16 values, float scale, float minimum, float largest) {
    const f32x16 steps = (values - minimum) / (scale > 0.0f ? scale : 1.0f);
    const f32x16 whole = (steps + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: ties to even
    const f32x16 positive = larger(whole, f32x16{});
    return where(positive < largest, positive, splat(largest));
}

template <class T>
double squared_error(const T *weights, Index size, float scale, float minimum) {
    Vector<double, 8> sums = {};
    for (Index i = 0; i < size; i += 16) {
        const f32x16 values = load16(weights + i);
        const f32x16 off = nearest(values, scale, minimum, 15.0f) * scale + minimum - values;
        const f32x16 squares = off * off;
        sums += converted<Vector<double, 8>>(low_half(squares));
        sums += converted<Vector<double, 8>>(high_half(squares));
    }
    double total = 0.0;
    for (int i = 0; i < 8; ++i) total += sums[i];
    return total;
}

// The scale and the minimum of a group whose weights lie from `low` to `high`, with zero between.
template <class T>
void choose(const T *weights, Index size, int bits, float low, float high, float &scale,
            float &minimum) {
    if (bits == 8) {
        scale = to_half(splat((high > -low ? high : -low) / 127.0f))[0];
        minimum = -128.0f * scale;
        return;
    }
    int clip = 0;
    float shares[16] = {};
    for (const double share : CLIPS) {
        shares[clip] = (high - low) * float(share / 15);
        shares[MINIMUMS + clip++] = low * float(share);
    }
    const f32x16 tried = to_half(load16(shares));
    double least = std::numeric_limits<double>::infinity();
    for (int c = 0; c < clip; ++c) {
        const double error = squared_error(weights, size, tried[c], tried[MINIMUMS + c]);
        if (error < least) {
            scale = tried[c];
            minimum = tried[MINIMUMS + c];
        }
        // NaN, of an infinite scale, stays: nothing fits.
        if (least == least && !(error >= least)) least = error;
    }
}

template <class T>
void round_group(const T *weights, Index size, int bits, uint8_t *codes, float &scale,
                 float &minimum) {
    f32x16 low = {}, high = {}, wrong = {};
    for (Index i = 0; i < size; i += 16) {
        const f32x16 values = load16(weights + i);
        low = where(values < low, values, low);
        high = larger(values, high);
        wrong += values - values;  // NaN where one is not finite
    }
    scale = minimum = std::numeric_limits<float>::infinity();  // refused by the caller
    if (sum(wrong) == 0.0f)
        choose(weights, size, bits, -largest_lane(-low), largest_lane(high), scale, minimum);
    const float largest = bits == 8 ? 255.0f : 15.0f;
    for (Index i = 0; i < size; i += 16) {
        const f32x16 whole = nearest(load16(weights + i), scale, minimum, largest);
        store_as(codes + i, converted<Vector<uint8_t, 16>>(converted<i32x16>(whole)));
    }
}

}  // namespace

void round_to_codes(Address weights, Address codes, Address scales, Address minimums, Index groups,
                    Index size, int bits, bool is_bf16, int threads) {
    with_type(is_bf16, [&](auto type) {
        const auto *from = at<const decltype(type)>(weights);
        share_rows(groups, threads, [&](Index g) {
            round_group(from + g * size, size, bits, at<uint8_t>(codes) + g * size,
                        at<float>(scales)[g], at<float>(minimums)[g]);
        });
    });
}
