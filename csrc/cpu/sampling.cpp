// Drawing tokens on a CPU. The Python twin and the specification are in minisgl/kernels/sampling:
// same thresholds, same noise, so the same tokens up to the rounding of exp and log.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "sampling.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

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

// The id with the best score so far, the lowest of equals.
struct Best {
    float score = -INF;
    Index id = 0;

    void consider(float other, Index other_id) {  // ids come in ascending order
        if (other > score) {
            score = other;
            id = other_id;
        }
    }
};

// The id in [begin, end) with the largest x / temperature + noise. v >= 2^e bounds the noise by
// -e ln 2, so a logarithm is taken only where a value may win.
Best drawn(const float *x, Index begin, Index end, float temperature, const Noise &noise) {
    constexpr float LN2 = 0.69314718f, SLACK = 1e-3f;
    const i32x16 lanes = lane_numbers();
    const float scale = 1.0f / temperature;
    Best best;
    const auto consider = [&](Index i) {
        best.consider(x[i] / temperature + noise.gumbel(std::uint32_t(i)), i);
    };
    Index i = begin;
    for (; i + 16 <= end; i += 16) {
        const u32x16 bits = noise.bits((u32x16)(lanes + std::int32_t(i)));
        const f32x16 v = (converted<f32x16>((i32x16)bits) + 0.5f) * Noise::SCALE;
        const i32x16 exponent = ((i32x16)v >> 23) - 127;
        const f32x16 z = load16(x + i) * scale;
        // Relative slack covers the rounding of the product.
        const f32x16 size = larger(z, -z);
        const f32x16 bound = z + size * 1e-6f + SLACK - converted<f32x16>(exponent) * LN2;
        const i32x16 may = bound > splat(best.score);
        if (any(may))
            for (int lane = 0; lane < 16; ++lane)
                if (may[lane]) consider(i + lane);
    }
    for (; i < end; ++i) consider(i);
    return best;
}

// Masses floor(e^(z - top) * 2^32). They are integers, and sums of them below 2^53, so doubles hold
// both exactly.
f32x16 masses16(f32x16 z, float top) {
    const f32x16 scaled = exp16(z - top) * 0x1p32f;
    const f32x16 whole = converted<f32x16>(converted<i32x16>(scaled));
    return where(scaled < 0x1p23f, whole, scaled);  // from 2^23 on a float has no fraction
}

double mass_of(const float *z, Index n, float top) {
    Vector<double, 16> sums = {};
    Index i = 0;
    for (; i + 16 <= n; i += 16) {
        const f32x16 values = load16(z + i);
        if (!any(values > splat(top - 22.5f))) continue;  // all below 2^-32
        sums += converted<Vector<double, 16>>(masses16(values, top));
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

// How far below the top candidates are gathered; further where that does not do.
constexpr float DEPTHS[] = {4.0f, 7.0f, 9.0f, 11.0f, 14.0f, 20.0f, INF};

// What one piece of a row contributes.
struct Piece {
    Best best;
    double mass = 0.0;         // of a row whose filter needs that of all values
    std::vector<Index> ids;    // candidates, ascending
    std::vector<float> z;      // their values over the temperature
};

// One row, and where the draw stands with it.
class Row {
  public:
    Row(const float *x, Index n, const Params &p, Index position)
        : x_(x), n_(n), p_(p), k_(p.top_k > 0 && p.top_k < n ? p.top_k : 0), noise_(p.key, position),
          draws_(p.temperature != 0.0f),
          filters_(draws_ && (k_ || p.top_p < 1.0f || p.min_p > 0.0f)) {}

    // The best of a piece. Where nothing is drawn yet that is its largest value, and where it begins.
    void look(Piece &piece, Index begin, Index end) const {
        if (draws_ && !filters_)
            piece.best = drawn(x_, begin, end, p_.temperature, noise_);
        else
            piece.best = {maximum(x_ + begin, end - begin), begin};
    }

    // Takes the best of all pieces for the token.
    float choose(const Piece *pieces, Index count) {
        Best best;
        for (Index i = 0; i < count; ++i) best.consider(pieces[i].best.score, pieces[i].best.id);
        token = best.id;
        return best.score;
    }

    // Whether filters choose among values of which `most` is the largest, in the piece that begins at
    // `token`. If not, that is the token: an infinite one has all mass.
    bool begin_filters(float most) {
        if (draws_ && !filters_) return false;
        most_ = most;
        top_ = most / p_.temperature;
        if (filters_ && most > -INF && most < INF) return true;
        const Index found = std::find(x_ + token, x_ + n_, most) - x_;
        token = found < n_ ? found : 0;
        return false;
    }

    // All ids of a piece within `depth` of the top.
    void gather(Piece &piece, Index begin, Index end, float depth) const {
        if (depth == DEPTHS[0] && p_.top_p < 1.0f && !k_) piece.mass = whole_mass(begin, end);
        const float cut = most_ - depth * p_.temperature;
        piece.ids.clear();
        piece.z.clear();
        const auto keep = [&](Index i) {
            piece.ids.push_back(i);
            piece.z.push_back(x_[i] / p_.temperature);
        };
        Index i = begin;
        for (; i + 16 <= end; i += 16) {
            const i32x16 in = load16(x_ + i) >= splat(cut);
            if (any(in))
                for (int lane = 0; lane < 16; ++lane)
                    if (in[lane]) keep(i + lane);
        }
        for (; i < end; ++i)
            if (x_[i] >= cut) keep(i);
    }

    // Sets the threshold, unless the candidates, of the given depth, may not hold all that are kept.
    void narrow(const Piece *pieces, Index count, float depth) {
        is_narrowed = find_threshold(pieces, count, depth);
    }

    void draw(Piece &piece) const {
        piece.best = {};
        for (std::size_t i = 0; i < piece.ids.size(); ++i)
            if (piece.z[i] >= threshold_) {
                const auto id = std::uint32_t(piece.ids[i]);
                piece.best.consider(piece.z[i] + noise_.gumbel(id), id);
            }
    }

    Index token = 0;
    bool is_narrowed = false;

  private:
    bool find_threshold(const Piece *pieces, Index count, float depth) {
        const bool whole = depth == INF;
        threshold_ = -INF;
        double total = 0.0;
        std::vector<float> values;
        for (Index i = 0; i < count; ++i) {
            total += pieces[i].mass;
            values.insert(values.end(), pieces[i].z.begin(), pieces[i].z.end());
        }
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
            const double wanted = double(p_.top_p) * (k_ ? held : total);
            if (held < wanted && !whole) return false;
            threshold_ = mass_threshold(values, top_, wanted);
        }
        if (p_.min_p > 0.0f) {
            const float lowest = top_ + std::log(p_.min_p);
            if (!k_ && p_.top_p >= 1.0f && top_ - lowest > depth - 0.01f) return false;
            float least = top_;
            for (Index i = 0; i < count; ++i)
                for (const float z : pieces[i].z)
                    if (z < least && passes_min_p(z, lowest)) least = z;
            threshold_ = std::max(threshold_, least);
        }
        return true;
    }

    double whole_mass(Index begin, Index end) const {
        constexpr Index BLOCK = 1024;
        float z[BLOCK];
        double total = 0.0;
        for (Index i = begin; i < end; i += BLOCK) {
            const Index count = std::min(BLOCK, end - i);
            for (Index j = 0; j < count; ++j) z[j] = x_[i + j] / p_.temperature;
            total += mass_of(z, count, top_);
        }
        return total;
    }

    // Whether e^(z - top) >= min_p; clearly so above `about`.
    bool passes_min_p(float z, float about) const {
        return z > about + 1e-3f || std::exp(z - top_) >= p_.min_p;
    }

    const float *x_;
    const Index n_;
    const Params &p_;
    const Index k_;  // 0 = off
    const Noise noise_;
    const bool draws_, filters_;
    float most_ = 0.0f, top_ = 0.0f, threshold_ = -INF;
};

}  // namespace

void sample(Address logits, Index count, Index vocab, Address rows, Address positions,
            Address params, Address out, int threads) {
    const Index each = pieces_of(vocab);
    std::vector<Piece> pieces(count * each);
    std::vector<Row> all;
    all.reserve(count);
    for (Index i = 0; i < count; ++i)
        all.emplace_back(at<const float>(logits) + i * vocab, vocab,
                         at<const Params>(params)[at<const std::int32_t>(rows)[i]],
                         at<const Index>(positions)[i]);
    share_pieces(count, vocab, threads, [&](Index i, Index begin, Index end) {
        all[i].look(pieces[i * each + begin / PIECE], begin, end);
    });
    std::vector<Index> filtered;
    for (Index i = 0; i < count; ++i)
        if (all[i].begin_filters(all[i].choose(&pieces[i * each], each))) filtered.push_back(i);
    std::vector<Index> left = filtered;
    for (const float depth : DEPTHS) {
        const auto rows_left = Index(left.size());
        share_pieces(rows_left, vocab, threads, [&](Index i, Index begin, Index end) {
            all[left[i]].gather(pieces[left[i] * each + begin / PIECE], begin, end, depth);
        });
        share(rows_left, threads_for(rows_left * vocab, threads),
              [&](Index i) { all[left[i]].narrow(&pieces[left[i] * each], each, depth); });
        std::erase_if(left, [&](Index i) { return all[i].is_narrowed; });
    }
    share_pieces(Index(filtered.size()), vocab, threads, [&](Index i, Index begin, Index) {
        all[filtered[i]].draw(pieces[filtered[i] * each + begin / PIECE]);
    });
    for (const Index i : filtered) all[i].choose(&pieces[i * each], each);
    for (Index i = 0; i < count; ++i) at<std::int32_t>(out)[i] = std::int32_t(all[i].token);
}
