// Vectors of so many lanes. Where they are wider than the machine's registers, two halves stand for one:
// a compiler would keep the whole in memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

template <class Half>
struct Halves {
    Half low, high;

    template <class Other>
    explicit operator Halves<Other>() const {  // the same bits
        return {(Other)low, (Other)high};
    }
    auto operator[](int lane) const {
        constexpr int HALF = sizeof(Half) / sizeof(low[0]);
        return lane < HALF ? low[lane] : high[lane - HALF];
    }
};

// Bytes of a register hold one whole step of work: lanes of 4 bytes, or more.
template <class T, int LANES, bool FITS = LANES * std::max<int>(sizeof(T), 4) <= REGISTER>
struct VectorOf {
    typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <class T, int LANES>
struct VectorOf<T, LANES, false> {
    using type = Halves<typename VectorOf<T, LANES / 2>::type>;
};
template <class T, int LANES>
using Vector = typename VectorOf<T, LANES>::type;

template <class V>
constexpr bool IN_HALVES = false;
template <class Half>
constexpr bool IN_HALVES<Halves<Half>> = true;

template <class V>
using Lane = std::remove_cvref_t<decltype(std::declval<V>()[0])>;
template <class V>
constexpr int LANES = sizeof(V) / sizeof(Lane<V>);
template <class V>
using HalfOf = Vector<Lane<V>, LANES<V> / 2>;

template <class V, class P>
inline V load_as(const P *p) {
    if constexpr (IN_HALVES<V>) {
        const char *bytes = reinterpret_cast<const char *>(p);
        using Half = decltype(V::low);
        return {load_as<Half>(bytes), load_as<Half>(bytes + sizeof(Half))};
    } else {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
}

// The first half from memory, zeros behind.
template <class V, class P>
inline V load_half_as(const P *p) {
    if constexpr (IN_HALVES<V>) {
        using Half = decltype(V::low);
        return {load_as<Half>(p), Half{}};
    } else {
        V v{};
        std::memcpy(&v, p, sizeof v / 2);
        return v;
    }
}

template <class V, class P>
inline void store_as(P *p, V v) {
    if constexpr (IN_HALVES<V>) {
        char *bytes = reinterpret_cast<char *>(p);
        store_as(bytes, v.low);
        store_as(bytes + sizeof v.low, v.high);
    } else {
        std::memcpy(p, &v, sizeof v);
    }
}

// v in every lane.
template <class V>
inline V filled(Lane<V> v) {
    if constexpr (IN_HALVES<V>)
        return {filled<decltype(V::low)>(v), filled<decltype(V::low)>(v)};
    else
        return v - V{};
}

template <class V>
inline auto low_half(V v) {
    if constexpr (IN_HALVES<V>)
        return v.low;
    else
        return load_as<HalfOf<V>>(&v);
}
template <class V>
inline auto high_half(V v) {
    if constexpr (IN_HALVES<V>)
        return v.high;
    else
        return load_as<HalfOf<V>>(reinterpret_cast<const char *>(&v) + sizeof v / 2);
}

// The lanes of v as numbers of another type.
template <class To, class From>
inline To converted(From v) {
    if constexpr (IN_HALVES<To>)
        return {converted<decltype(To::low)>(low_half(v)), converted<decltype(To::low)>(high_half(v))};
    else
        return __builtin_convertvector(v, To);
}

// Lanes of a where the mask's are not zero, else of b.
template <class M, class V>
inline V where(M mask, V a, V b) {
    if constexpr (IN_HALVES<V>)
        return {where(mask.low, a.low, b.low), where(mask.high, a.high, b.high)};
    else
        return mask ? a : b;
}

// Lane i is lane LANE(i) of a and b in a row; of one register each.
template <auto LANE, class V>
inline V shuffled(V a, V b) {
    return [&]<int... I>(std::integer_sequence<int, I...>) -> V {
#if defined(__clang__)
        return __builtin_shufflevector(a, b, LANE(I)...);
#else
        return __builtin_shuffle(a, b, Vector<int32_t, LANES<V>>{LANE(I)...});
#endif
    }(std::make_integer_sequence<int, LANES<V>>{});
}

// Of each four lanes, those of a (0 to 3) and of b (4 to 7) in this order.
template <int... ORDER, class V>
inline V picked(V a, V b) {
    if constexpr (IN_HALVES<V>) {
        return {picked<ORDER...>(a.low, b.low), picked<ORDER...>(a.high, b.high)};
    } else {
        constexpr auto lane = [](int i) {
            constexpr int order[4] = {ORDER...};
            return i / 4 * 4 + order[i % 4] % 4 + (order[i % 4] < 4 ? 0 : LANES<V>);
        };
        return shuffled<lane>(a, b);
    }
}

// The halves of a added up, and behind them those of b.
template <class V>
inline V folded(V a, V b) {
    if constexpr (IN_HALVES<V>) {
        return {a.low + a.high, b.low + b.high};
    } else {
        constexpr int HALF = LANES<V> / 2;
        constexpr auto low = [](int i) { return i < HALF ? i : i + HALF; };
        constexpr auto high = [](int i) { return i < HALF ? i + HALF : i + 2 * HALF; };
        return shuffled<low>(a, b) + shuffled<high>(a, b);
    }
}

#define IN_BOTH_HALVES(OP)                                                                  \
    template <class H>                                                                      \
    inline auto operator OP(Halves<H> a, Halves<H> b) {                                     \
        return Halves<decltype(a.low OP b.low)>{a.low OP b.low, a.high OP b.high};          \
    }                                                                                       \
    template <class H, class S>                                                             \
        requires std::is_arithmetic_v<S>                                                    \
    inline auto operator OP(Halves<H> a, S b) {                                             \
        return a OP filled<Halves<H>>(b);                                                   \
    }                                                                                       \
    template <class H, class S>                                                             \
        requires std::is_arithmetic_v<S>                                                    \
    inline auto operator OP(S a, Halves<H> b) {                                             \
        return filled<Halves<H>>(a) OP b;                                                   \
    }
IN_BOTH_HALVES(+)
IN_BOTH_HALVES(-)
IN_BOTH_HALVES(*)
IN_BOTH_HALVES(/)
IN_BOTH_HALVES(&)
IN_BOTH_HALVES(|)
IN_BOTH_HALVES(^)
IN_BOTH_HALVES(<<)
IN_BOTH_HALVES(>>)
IN_BOTH_HALVES(<)
IN_BOTH_HALVES(>)
IN_BOTH_HALVES(>=)
IN_BOTH_HALVES(==)
IN_BOTH_HALVES(!=)
#undef IN_BOTH_HALVES

template <class H>
inline Halves<H> operator-(Halves<H> v) {
    return {-v.low, -v.high};
}
template <class H>
inline Halves<H> operator~(Halves<H> v) {
    return {~v.low, ~v.high};
}
template <class H, class B>
inline void operator+=(Halves<H> &a, B b) {
    a = a + b;
}
template <class H, class B>
inline void operator*=(Halves<H> &a, B b) {
    a = a * b;
}
template <class H, class B>
inline void operator^=(Halves<H> &a, B b) {
    a = a ^ b;
}
