// Drawing tokens on a CPU. The Python twin and the specification are in minisgl/kernels/sampling:
// same thresholds, same noise, so the same tokens up to the rounding of exp and log.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "model_ops.h"
#include "pool.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr Index WORTH_SHARING = 1 << 15;  // logits: waking a thread for fewer costs more

// One row's record; minisgl.kernels.sampling.PARAMS.
struct Params {
    float temperature, top_p, min_p, repetition, presence, frequency;
    std::int32_t top_k, min_length, num_bans, num_biases;
    std::uint64_t key;
    std::int32_t needs_counts, unused;
};
static_assert(sizeof(Params) == 56);

// minisgl.kernels.sampling.noise, for one row and position.
struct Noise {
    std::uint32_t low, high;

    Noise(std::uint64_t key, Index position) {
        std::uint64_t x = key + std::uint64_t(position + 1) * 0x9E3779B97F4A7C15u;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        x ^= x >> 31;
        low = std::uint32_t(x);
        high = std::uint32_t(x >> 32);
    }

    // Of one id or of a vector of ids.
    template <class U>
    U bits(U x) const {
        x ^= low;
        x ^= x >> 16;
        x *= 0x7FEB352Du;
        x ^= x >> 15;
        x += high;
        x *= 0x846CA68Bu;
        x ^= x >> 16;
        return x & 0x7FFFFFFFu;
    }

    static constexpr float SCALE = 0x1p-31f - 0x1p-55f;

    float gumbel(std::uint32_t id) const {
        const float v = (float(bits(id)) + 0.5f) * SCALE;
        return -std::log(-std::log1p(-v));
    }
};

bool any(i32x16 mask) {
    std::uint64_t words[8], all = 0;
    std::memcpy(words, &mask, sizeof mask);
    for (const std::uint64_t word : words) all |= word;
    return all != 0;
}

// The largest of x[0:n]; -inf for none.
float maximum(const float *x, Index n) {
    f32x16 most = splat(-INF);
    Index i = 0;
    for (; i + 16 <= n; i += 16) most = larger(load16(x + i), most);
    float best = -INF;
    for (int lane = 0; lane < 16; ++lane) best = std::max(best, most[lane]);
    for (; i < n; ++i) best = std::max(best, x[i]);
    return best;
}

Index greedy(const float *x, Index n) {
    const Index at = std::find(x, x + n, maximum(x, n)) - x;
    return at < n ? at : 0;
}

// The id with the largest x / temperature + noise. v >= 2^e bounds the noise by -e ln 2, so a
// logarithm is taken only where a value may win.
Index draw_from_all(const float *x, Index n, float temperature, const Noise &noise) {
    constexpr float LN2 = 0.69314718f, SLACK = 1e-3f;
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const float scale = 1.0f / temperature;
    float best = -INF;
    Index winner = 0;
    const auto consider = [&](Index i) {
        const float score = x[i] / temperature + noise.gumbel(std::uint32_t(i));
        if (score > best) {
            best = score;
            winner = i;
        }
    };
    Index i = 0;
    for (; i + 16 <= n; i += 16) {
        const u32x16 bits = noise.bits((u32x16)(lanes + std::int32_t(i)));
        const f32x16 v = (__builtin_convertvector((i32x16)bits, f32x16) + 0.5f) * Noise::SCALE;
        const i32x16 exponent = ((i32x16)v >> 23) - 127;
        const f32x16 z = load16(x + i) * scale;
        // Relative slack covers the rounding of the product.
        const f32x16 size = z < 0.0f ? -z : z;
        const f32x16 bound = z + size * 1e-6f + SLACK - __builtin_convertvector(exponent, f32x16) * LN2;
        const i32x16 may = bound > splat(best);
        if (any(may))
            for (int lane = 0; lane < 16; ++lane)
                if (may[lane]) consider(i + lane);
    }
    for (; i < n; ++i) consider(i);
    return winner;
}

// Masses floor(e^(z - top) * 2^32). They are integers, and sums of them below 2^53, so doubles hold
// both exactly.
f32x16 masses16(f32x16 z, float top) {
    const f32x16 scaled = exp16(z - top) * 0x1p32f;
    const f32x16 whole = __builtin_convertvector(__builtin_convertvector(scaled, i32x16), f32x16);
    return scaled < 0x1p23f ? whole : scaled;  // from 2^23 on a float has no fraction
}

double mass_of(const float *z, Index n, float top) {
    typedef double f64x16 __attribute__((vector_size(128)));
    f64x16 sums = {};
    Index i = 0;
    for (; i + 16 <= n; i += 16) {
        const f32x16 values = load16(z + i);
        if (!any(values > splat(top - 22.5f))) continue;  // all below 2^-32
        sums += __builtin_convertvector(masses16(values, top), f64x16);
    }
    double total = 0.0;
    for (int lane = 0; lane < 16; ++lane) total += sums[lane];
    for (; i < n; ++i) total += masses16(splat(z[i]), top)[0];
    return total;
}

// The largest t with mass{z >= t} >= wanted, else the least z. Halves what is left in every round
// and sums the upper half: linear in the number of values.
float mass_threshold(std::vector<float> &z, float top, double wanted) {
    float *low = z.data(), *high = low + z.size();
    while (high - low > 1) {
        float *middle = low + (high - low) / 2;
        std::nth_element(low, middle, high, std::greater<float>());
        const double upper = mass_of(low, middle - low, top);
        if (upper >= wanted) {
            high = middle;
        } else {
            wanted -= upper;
            low = middle;
        }
    }
    return *low;
}

// The candidates of a row with filters: an upper set of its values that holds all that are kept.
class Filter {
  public:
    Filter(const float *x, Index n, const Params &p)
        : x_(x), n_(n), p_(p), k_(p.top_k > 0 && p.top_k < n ? p.top_k : 0) {}

    Index draw(const Noise &noise) {
        const float most = maximum(x_, n_);
        if (!(most > -INF)) return 0;
        if (most == INF) return greedy(x_, n_);  // it has all the mass
        top_ = most / p_.temperature;
        if (p_.top_p < 1.0f && !k_) total_ = whole_mass();
        for (const float depth : {4.0f, 7.0f, 9.0f, 11.0f, 14.0f, 20.0f, INF}) {
            gather(most - depth * p_.temperature);
            if (narrow(depth)) break;
        }
        float best = -INF;
        Index winner = 0;
        for (std::size_t i = 0; i < ids_.size(); ++i) {
            if (z_[i] < threshold_) continue;
            const float score = z_[i] + noise.gumbel(std::uint32_t(ids_[i]));
            if (score > best) {
                best = score;
                winner = ids_[i];
            }
        }
        return winner;
    }

  private:
    double whole_mass() const {
        constexpr Index BLOCK = 1024;
        float z[BLOCK];
        double total = 0.0;
        for (Index i = 0; i < n_; i += BLOCK) {
            const Index count = std::min(BLOCK, n_ - i);
            for (Index j = 0; j < count; ++j) z[j] = x_[i + j] / p_.temperature;
            total += mass_of(z, count, top_);
        }
        return total;
    }

    // All ids with x >= cut, ascending, and their z.
    void gather(float cut) {
        ids_.clear();
        z_.clear();
        const auto keep = [&](Index i) {
            ids_.push_back(i);
            z_.push_back(x_[i] / p_.temperature);
        };
        Index i = 0;
        for (; i + 16 <= n_; i += 16) {
            const i32x16 in = load16(x_ + i) >= splat(cut);
            if (any(in))
                for (int lane = 0; lane < 16; ++lane)
                    if (in[lane]) keep(i + lane);
        }
        for (; i < n_; ++i)
            if (x_[i] >= cut) keep(i);
    }

    // Sets the threshold; false when the candidates, of the given depth, may not hold all kept.
    bool narrow(float depth) {
        const bool whole = depth == INF;
        threshold_ = -INF;
        std::vector<float> values(z_);
        if (k_) {
            if (Index(values.size()) < k_ && !whole) return false;
            const auto kth = values.begin() + std::min<Index>(k_, values.size()) - 1;
            std::nth_element(values.begin(), kth, values.end(), std::greater<float>());
            threshold_ = *kth;
            const auto kept = [&](float z) { return z >= threshold_; };
            values.erase(std::partition(values.begin(), values.end(), kept), values.end());
        }
        if (p_.top_p < 1.0f) {
            const double held = mass_of(values.data(), Index(values.size()), top_);
            const double wanted = double(p_.top_p) * (k_ ? held : total_);
            if (held < wanted && !whole) return false;
            threshold_ = mass_threshold(values, top_, wanted);
        }
        if (p_.min_p > 0.0f) {
            const float lowest = top_ + std::log(p_.min_p);
            if (!k_ && p_.top_p >= 1.0f && top_ - lowest > depth - 0.01f) return false;
            threshold_ = std::max(threshold_, least_of_min_p(lowest));
        }
        return true;
    }

    // The smallest candidate z with e^(z - top) >= min_p; `about` is where to look.
    float least_of_min_p(float about) const {
        float least = top_;
        for (const float z : z_)
            if (z < least && (z > about + 1e-3f || std::exp(z - top_) >= p_.min_p)) least = z;
        return least;
    }

    const float *x_;
    const Index n_;
    const Params &p_;
    const Index k_;  // 0 = off
    float top_ = 0.0f, threshold_ = -INF;
    double total_ = 0.0;  // mass of all values
    std::vector<Index> ids_;
    std::vector<float> z_;
};

}  // namespace

void sample(Address logits, Index count, Index vocab, Address rows, Address positions,
            Address params, Address out, int threads) {
    share(count, count * vocab < WORTH_SHARING ? 1 : threads, [&](Index i) {
        const Params &p = at<const Params>(params)[at<const std::int32_t>(rows)[i]];
        const float *values = at<const float>(logits) + i * vocab;
        const bool filtered =
            (p.top_k > 0 && p.top_k < vocab) || p.top_p < 1.0f || p.min_p > 0.0f;
        const Noise noise(p.key, at<const Index>(positions)[i]);
        Index token;
        if (p.temperature == 0.0f)
            token = greedy(values, vocab);
        else if (filtered)
            token = Filter(values, vocab, p).draw(noise);
        else
            token = draw_from_all(values, vocab, p.temperature, noise);
        at<std::int32_t>(out)[i] = std::int32_t(token);
    });
}
