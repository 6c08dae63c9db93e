// What a few tokens cost on a CPU, without a thousand small calls. kernels.py says what each function computes.
//
// Every sum of products runs over K in one order, a lane for each of a vector's places, however many rows are computed
// together: a token's numbers do not depend on who else is in the batch. Vectors are GCC's and clang's own, so that the
// same source serves AVX2, AVX-512 and NEON; a few operations alone are named by their instructions.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef int16_t Shorts __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef int16_t Narrow __attribute__((vector_size(BYTES / 2)));
typedef int8_t Bytes __attribute__((vector_size(BYTES / 2)));
typedef float Four __attribute__((vector_size(16)));
typedef int64_t n_t;

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// a b + c, rounded in one way wherever it stands: a compiler joins the two operations here and not there
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Twice as wide, by one instruction where a compiler finds five
inline Words spread(Halves v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, Words);
#endif
}

inline Shorts spread(Bytes v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (Shorts)_mm512_cvtepi8_epi16((__m256i)v);
#elif defined(__AVX2__)
    return (Shorts)_mm256_cvtepi8_epi16((__m128i)v);
#else
    return __builtin_convertvector(v, Shorts);
#endif
}

inline Four folded(Floats v) {
    Four parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    Four sum = parts[0];
    for (int i = 1; i < LANES / 4; ++i) sum += parts[i];
    return sum;
}

inline float total(Floats v) {
    const Four sum = folded(v);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// The totals of four, added in the same order
inline Four totals(Floats a, Floats b, Floats c, Floats d) {
    const Four p = folded(a), q = folded(b), r = folded(c), s = folded(d);
    const Four x = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    const Four y = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
}

// --- numbers as they are kept, and what they are multiplied with ----------------------------------------------------

struct Float32 {
    typedef float kept;
    typedef float other;
    typedef Floats Sum;
    static constexpr int step = LANES;
    static Floats wide(const float* w) { return load<Floats>(w); }
    static float one(float w) { return w; }
    static float narrow(float x) { return x; }
    static Floats right(const float* x) { return load<Floats>(x); }
    static void add(Floats& sum, Floats w, Floats x) { sum = fused(w, x, sum); }
    static Floats close(Floats sum) { return sum; }
};

struct BFloat16 : Float32 {  // but for how it is kept
    typedef uint16_t kept;
    static Floats wide(const uint16_t* w) {
        Words bits = spread(load<Halves>(w)) << 16;
        Floats v;
        std::memcpy(&v, &bits, sizeof v);
        return v;
    }
    static float one(uint16_t w) {
        uint32_t bits = uint32_t(w) << 16;
        float v;
        std::memcpy(&v, &bits, sizeof v);
        return v;
    }
    static uint16_t narrow(float x) {  // to the nearest, of two equally near the even one
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
};

// int8 times 16-bit integers: pairs of products are added in 32 bits, which hold LONGEST of them in every lane.
struct Int8 {
    typedef int8_t kept;
    typedef int16_t other;
    typedef Ints Sum;
    static constexpr int step = 2 * LANES;
    static Shorts wide(const int8_t* w) { return spread(load<Bytes>(w)); }
    static float one(int8_t w) { return w; }
    static Shorts right(const int16_t* x) { return load<Shorts>(x); }
    static void add(Ints& sum, Shorts w, Shorts x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
        sum += (Ints)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
        sum += (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
        for (int i = 0; i < LANES; ++i) sum[i] += int32_t(w[2 * i]) * x[2 * i] + int32_t(w[2 * i + 1]) * x[2 * i + 1];
#endif
    }
    static Floats close(Ints sum) { return __builtin_convertvector(sum, Floats); }
};

constexpr n_t LONGEST = 2048;  // 127 * 32767 * 2048 / 4 lanes < 2^31
constexpr float LEVELS = 32767.0f;

// y[i][j] = sum_k w[i][k] x[j][k] for I rows of W and J of x. All loops over I and J are unrolled: the sums are registers.
template <class P, int I, int J>
inline void tile(const typename P::kept* w, n_t w_row, const typename P::other* x, n_t x_row, n_t K, float y[I][J]) {
    for (n_t from = 0; from < K || from == 0; from += LONGEST) {
        const n_t to = std::min(K, from + LONGEST);
        typename P::Sum sums[I][J];
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < J; ++j) sums[i][j] = typename P::Sum{};
        n_t k = from;
        for (; k + P::step <= to; k += P::step) {
#pragma GCC unroll 4
            for (int i = 0; i < I; ++i) {
                const auto wide = P::wide(w + i * w_row + k);
#pragma GCC unroll 3
                for (int j = 0; j < J; ++j) P::add(sums[i][j], wide, P::right(x + j * x_row + k));
            }
        }
        float part[I][J];
#pragma GCC unroll 3
        for (int j = 0; j < J; ++j) {
            if constexpr (I == 4) {
                const Four four = totals(P::close(sums[0][j]), P::close(sums[1][j]), P::close(sums[2][j]),
                                         P::close(sums[3][j]));
#pragma GCC unroll 4
                for (int i = 0; i < I; ++i) part[i][j] = four[i];
            } else {
#pragma GCC unroll 4
                for (int i = 0; i < I; ++i) part[i][j] = total(P::close(sums[i][j]));
            }
        }
        for (; k < to; ++k)
            for (int i = 0; i < I; ++i)
                for (int j = 0; j < J; ++j)
                    part[i][j] = fused(P::one(w[i * w_row + k]), x[j * x_row + k], part[i][j]);
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < J; ++j) y[i][j] = from ? y[i][j] + part[i][j] : part[i][j];
    }
}

// store(row of W, row of x, sum) for I rows of W, `apart` from each other, from n, and J of x, side by side, from j
template <class P, int I, int J, class Store>
inline void strip(const typename P::kept* w, n_t w_row, n_t n, n_t apart, const typename P::other* x, n_t x_row, n_t j,
                  n_t K, Store store) {
    float y[I][J];
    tile<P, I, J>(w + n * w_row, apart * w_row, x + j * x_row, x_row, K, y);
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 3
        for (int b = 0; b < J; ++b) store(n + i * apart, j + b, y[i][b]);
}

// The same for rows first .. last - 1 of W and all m of x. Four rows of W at once that lie far from each other: memory
// hands over four streams sooner than one.
template <class P, class Store>
void products(const typename P::kept* w, n_t w_row, n_t first, n_t last, const typename P::other* x, n_t x_row, n_t m,
              n_t K, Store store) {
    const n_t quarter = (last - first) / 4;
    for (n_t n = first; n < first + quarter; ++n) {
        n_t j = 0;
        for (; m - j > 4 || m - j == 3; j += 3) strip<P, 4, 3>(w, w_row, n, quarter, x, x_row, j, K, store);
        for (; m - j >= 2; j += 2) strip<P, 4, 2>(w, w_row, n, quarter, x, x_row, j, K, store);
        if (j < m) strip<P, 4, 1>(w, w_row, n, quarter, x, x_row, j, K, store);
    }
    for (n_t n = first + 4 * quarter; n < last; ++n)
        for (n_t j = 0; j < m; ++j) strip<P, 1, 1>(w, w_row, n, 0, x, x_row, j, K, store);
}

// --- threads --------------------------------------------------------------------------------------------------------

constexpr n_t ALONE = 1 << 15;  // products that one thread is done with before a second has woken

// f(thread, threads) on each of a team; it may wait for the others by `meet`
template <class F>
void team(int threads, n_t work, F f) {
#ifdef _OPENMP
    if (threads > 1 && work > ALONE) {
#pragma omp parallel num_threads(threads)
        f(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    f(0, 1);
}

inline void meet(int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
}

struct Range {
    n_t first, last;
};

inline Range share(n_t count, int thread, int threads, n_t unit = 8) {
    const n_t units = (count + unit - 1) / unit;
    return {std::min(count, units * thread / threads * unit), std::min(count, units * (thread + 1) / threads * unit)};
}

// --- elementwise ----------------------------------------------------------------------------------------------------

// The nearest whole number, of |x| < 2^22: 1.5 * 2^23 has no room for a fraction.
inline Floats nearest(Floats x) {
    const Floats shift = Floats{} + 12582912.0f;
    return (x + shift) - shift;
}

// e^x to 1e-7: 2^n times a polynomial in what is left, |r| <= ln 2 / 2. NaN stays NaN.
inline Floats exp_of(Floats x) {
    const Floats most = Floats{} + 88.0f, least = Floats{} - 87.0f;
    x = x > most ? most : x;
    x = x < least ? least : x;
    const Floats n = nearest(x * 1.44269504088896341f);
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats two;
    std::memcpy(&two, &power, sizeof two);
    return p * two;
}

inline float exp_of(float x) { return exp_of(Floats{} + x)[0]; }

// silu(gate) up weight, in place over gate. The last few go through the same vectors, so that they are rounded alike.
inline void swiglu(float* gate, const float* up, n_t count, float weight) {
    for (n_t i = 0; i < count; i += LANES) {
        const size_t bytes = std::min(count - i, n_t(LANES)) * sizeof(float);
        Floats g = {}, u = {};
        std::memcpy(&g, gate + i, bytes);
        std::memcpy(&u, up + i, bytes);
        const Floats y = g / (exp_of(-g) + 1.0f) * u * weight;
        std::memcpy(gate + i, &y, bytes);
    }
}

// x in whole numbers: x ~ step q, step = max |x| / LEVELS. A row with NaN or inf has NaN for its step.
float whole(const float* x, n_t count, int16_t* q) {
    const float largest = std::numeric_limits<float>::max();
    float most = 0;
    bool finite = true;
    for (n_t i = 0; i < count; ++i) {
        const float size = std::fabs(x[i]);
        finite &= size <= largest;
        most = size > most ? size : most;
    }
    const float per = LEVELS / most;
    if (!finite || !(per <= largest)) {  // the last: all zeros, or so small that they may be
        std::fill(q, q + count, int16_t(0));
        return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    n_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats n = nearest(load<Floats>(x + i) * per);
        const Narrow narrow = __builtin_convertvector(__builtin_convertvector(n, Ints), Narrow);
        std::memcpy(q + i, &narrow, sizeof narrow);
    }
    for (; i < count; ++i) q[i] = int16_t(nearest(Floats{} + x[i] * per)[0]);
    return most / LEVELS;
}

std::vector<float>& floats(int which, size_t count) {
    thread_local std::vector<float> kept[13];
    if (kept[which].size() < count) kept[which].resize(count);
    return kept[which];
}

std::vector<int16_t>& shorts(int which, size_t count) {
    thread_local std::vector<int16_t> kept[2];
    if (kept[which].size() < count) kept[which].resize(count);
    return kept[which];
}

// --- rows as a kind of weight wants them ----------------------------------------------------------------------------

// x as it is; with int8 in whole numbers, with a step a row
template <class P>
struct Rows {
    const typename P::other* x;
    n_t row;
    const float* steps;
    float step(n_t) const { return 1.0f; }
};

template <>
inline float Rows<Int8>::step(n_t j) const {
    return steps[j];
}

template <class P>
float scale_of(const float* scales, n_t) {
    (void)scales;
    return 1.0f;
}

template <>
inline float scale_of<Int8>(const float* scales, n_t n) {
    return scales[n];
}

// --- the functions --------------------------------------------------------------------------------------------------

template <class P>
void product(const float* x, n_t m, n_t x_row, const void* weight, const float* scales, n_t N, n_t K, float* y,
             int threads) {
    const auto* w = static_cast<const typename P::kept*>(weight);
    constexpr bool integers = std::is_same<P, Int8>::value;
    int16_t* q = integers ? shorts(0, m * K).data() : nullptr;
    float* steps = integers ? floats(0, m).data() : nullptr;
    team(threads, m * N * K, [&](int thread, int all) {
        Rows<P> rows{reinterpret_cast<const typename P::other*>(x), x_row, steps};
        if constexpr (integers) {
            const Range mine = share(m, thread, all, 1);
            for (n_t j = mine.first; j < mine.last; ++j) steps[j] = whole(x + j * x_row, K, q + j * K);
            meet(all);
            rows = {q, K, steps};
        }
        const Range mine = share(N, thread, all);
        products<P>(w, K, mine.first, mine.last, rows.x, rows.row, m, K, [&](n_t n, n_t j, float sum) {
            y[j * N + n] = sum * scale_of<P>(scales, n) * rows.step(j);
        });
    });
}

// Experts, one after the other, or one network: gate and up of each begin 2 I rows after the last
struct Network {
    const void *gate, *up, *down;
    const float *gate_scales, *up_scales, *down_scales;
};

// y (n, D), or with add what is added to it, = sum_k weights (n, K) W_down,e (silu(W_gate,e x) * W_up,e x) for e = chosen (n, K)
template <class P>
void feed(const Network& net, const float* x, n_t n, const int64_t* chosen, const float* weights, n_t k, n_t E, n_t D,
          n_t I, float* y, bool add, int threads) {
    typedef typename P::kept kept;
    typedef typename P::other other;
    constexpr bool integers = std::is_same<P, Int8>::value;
    const n_t count = n * k;
    // assignments sorted by expert: those of e are order[first[e]] .. order[first[e + 1] - 1]
    std::vector<n_t> first(E + 1, 0), order(count), runs;
    const auto expert_of = [&](n_t a) { return chosen ? chosen[a] : 0; };
    for (n_t a = 0; a < count; ++a) ++first[expert_of(a) + 1];
    for (n_t e = 0; e < E; ++e) {
        if (first[e + 1]) runs.push_back(e);
        first[e + 1] += first[e];
    }
    {
        std::vector<n_t> next(first.begin(), first.end() - 1);
        for (n_t a = 0; a < count; ++a) order[next[expert_of(a)]++] = a;
    }
    const bool sorted = count == n && runs.size() == 1;  // one network for all: x is in order
    float* inner = floats(0, count * I).data();          // gate, then what goes into W_down
    float* up = floats(1, count * I).data();
    float* entered = (integers || sorted) ? nullptr : floats(2, count * D).data();
    float* steps = integers ? floats(2, n + 2 * count).data() : nullptr;
    int16_t* whole_x = integers ? shorts(0, (n + count) * D).data() : nullptr;
    int16_t* whole_inner = integers ? shorts(1, count * I).data() : nullptr;
    team(threads, count * I * D, [&](int thread, int all) {
        const other* rows;
        const float* row_steps = nullptr;
        if constexpr (integers) {
            Range mine = share(n, thread, all, 1);
            for (n_t j = mine.first; j < mine.last; ++j) steps[j] = whole(x + j * D, D, whole_x + j * D);
            meet(all);
            mine = share(count, thread, all, 1);
            for (n_t r = mine.first; r < mine.last; ++r) {
                const n_t token = order[r] / k;
                steps[n + r] = steps[token];
                std::memcpy(whole_x + (n + r) * D, whole_x + token * D, D * sizeof(int16_t));
            }
            rows = whole_x + n * D;
            row_steps = steps + n;
            meet(all);
        } else if (sorted) {
            rows = x;
        } else {
            const Range mine = share(count, thread, all, 1);
            for (n_t r = mine.first; r < mine.last; ++r)
                std::memcpy(entered + r * D, x + order[r] / k * D, D * sizeof(float));
            rows = entered;
            meet(all);
        }
        // the chosen experts' rows as one long list, of which each thread has a part
        const Range mine = share(n_t(runs.size()) * I, thread, all);
        for (n_t at = mine.first; at < mine.last;) {
            const n_t run = at / I, e = runs[run], from = at - run * I;
            const n_t to = std::min(I, from + mine.last - at), start = first[e], m = first[e + 1] - start;
            const Rows<P> mine_rows{rows + start * D, D, row_steps ? row_steps + start : nullptr};
            for (int half = 0; half < 2; ++half) {
                const auto* w = static_cast<const kept*>(half ? net.up : net.gate) + e * 2 * I * D;
                const float* scales = half ? net.up_scales : net.gate_scales;
                if (scales) scales += e * 2 * I;
                float* out = (half ? up : inner) + start * I;
                products<P>(w, D, from, to, mine_rows.x, D, m, D, [&](n_t i, n_t j, float sum) {
                    out[j * I + i] = sum * scale_of<P>(scales, i) * mine_rows.step(j);
                });
            }
            for (n_t r = start; r < start + m; ++r)
                swiglu(inner + r * I + from, up + r * I + from, to - from, weights ? weights[order[r]] : 1.0f);
            at += to - from;
        }
        meet(all);
        const float* inner_steps = nullptr;
        if constexpr (integers) {
            const Range mine = share(count, thread, all, 1);
            for (n_t r = mine.first; r < mine.last; ++r)
                steps[n + count + r] = whole(inner + r * I, I, whole_inner + r * I);
            inner_steps = steps + n + count;
            meet(all);
        }
        const Range out = share(D, thread, all);
        for (n_t t = 0; t < n && !add; ++t) std::fill(y + t * D + out.first, y + t * D + out.last, 0.0f);
        for (n_t e : runs) {
            const n_t start = first[e], m = first[e + 1] - start;
            const auto* w = static_cast<const kept*>(net.down) + e * D * I;
            const float* scales = net.down_scales ? net.down_scales + e * D : nullptr;
            const other* from;
            if constexpr (integers)
                from = whole_inner + start * I;
            else
                from = inner + start * I;
            const Rows<P> ready{from, I, inner_steps ? inner_steps + start : nullptr};
            products<P>(w, I, out.first, out.last, ready.x, I, m, I, [&](n_t d, n_t j, float sum) {
                float& out = y[order[start + j] / k * D + d];
                out = fused(sum * scale_of<P>(scales, d), ready.step(j), out);
            });
        }
    });
}

// y[j] += sum_i p[j][i] w[i] for J rows of p and I of w, over columns of w; fresh: y has nothing yet
template <class P, int I, int J>
inline void mix(const typename P::kept* w, n_t w_row, const float* p, n_t p_row, n_t width, float* y, n_t y_row,
                bool fresh) {
    n_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        Floats wide[I];
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) wide[i] = P::wide(w + i * w_row + c);
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
            Floats sum = fresh ? Floats{} : load<Floats>(y + j * y_row + c);
#pragma GCC unroll 4
            for (int i = 0; i < I; ++i) sum = fused(wide[i], Floats{} + p[j * p_row + i], sum);
            std::memcpy(y + j * y_row + c, &sum, sizeof sum);
        }
    }
    for (; c < width; ++c)
        for (int j = 0; j < J; ++j) {
            float sum = fresh ? 0 : y[j * y_row + c];
            for (int i = 0; i < I; ++i) sum = fused(P::one(w[i * w_row + c]), p[j * p_row + i], sum);
            y[j * y_row + c] = sum;
        }
}

// The same for m rows of p and count of w, four at a time: four streams of memory
template <class P>
void mix_all(const typename P::kept* w, n_t w_row, n_t count, const float* p, n_t p_row, n_t m, n_t width, float* y,
             n_t y_row, bool fresh) {
    for (n_t i = 0; i < count; fresh = false) {
        const bool four = i + 4 <= count;
        n_t j = 0;
        for (; j + 2 <= m; j += 2)
            (four ? mix<P, 4, 2> : mix<P, 1, 2>)(w + i * w_row, w_row, p + j * p_row + i, p_row, width, y + j * y_row,
                                                 y_row, fresh);
        if (j < m)
            (four ? mix<P, 4, 1> : mix<P, 1, 1>)(w + i * w_row, w_row, p + j * p_row + i, p_row, width, y + j * y_row,
                                                 y_row, fresh);
        i += four ? 4 : 1;
    }
}

// softmax of a row, in place; hidden places get 0
void softmax(float* s, n_t count, const uint8_t* seen) {
    float most = -std::numeric_limits<float>::infinity();
    for (n_t i = 0; i < count; ++i)
        if (!seen || seen[i]) most = std::max(most, s[i]);
    n_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats e = exp_of(load<Floats>(s + i) - most);
        std::memcpy(s + i, &e, sizeof e);
    }
    for (; i < count; ++i) s[i] = exp_of(s[i] - most);
    float sum = 0;
    for (i = 0; i < count; ++i) {
        if (seen && !seen[i]) s[i] = 0;
        sum += s[i];
    }
    const float per = 1 / sum;
    for (i = 0; i < count; ++i) s[i] *= per;
}

// Where tokens of B rows lie: token s of row b is token s % size of block table[b * per_row + s / size]
struct Places {
    const n_t *table, *lengths;
    n_t per_row, size;

    // f(first token, tokens, block, first token in it) for every run of memory of a row
    template <class F>
    void each(n_t b, F f) const {
        const n_t *blocks = table + b * per_row, length = lengths[b];
        for (n_t s = 0; s < length;) {
            const n_t begin = s / size;
            n_t end = begin + 1;
            while (end * size < length && blocks[end] == blocks[end - 1] + 1) ++end;
            const n_t to = std::min(length, end * size);
            f(s, to - s, blocks[begin]);
            s = to;
        }
    }
};

// The last token of every row into the cache
template <class Q>
void keep(const Places& places, n_t B, const float* x, n_t width, void* cache, n_t block, n_t row) {
    auto* kept = static_cast<typename Q::kept*>(cache);
    for (n_t b = 0; b < B; ++b) {
        const n_t s = places.lengths[b] - 1;
        auto* to = kept + places.table[b * places.per_row + s / places.size] * block + s % places.size * row;
        for (n_t i = 0; i < width; ++i) to[i] = Q::narrow(x[b * width + i]);
    }
}

struct Latent {
    n_t B, T, S, N, H, R, V, C;    // S: of the longest row
    const float* q;                // (B, T, N, H + R)
    const void *c, *k_rope;        // blocks of tokens of C and R numbers, with strides
    n_t c_block, c_row, k_block, k_row;
    Places places;
    const void* weight;            // (N, H + V, C)
    const uint8_t* mask;           // (B or 1, T, S) or null
    n_t mask_batch, mask_row;
    bool causal;                   // without a mask: token t sees the first S - T + t + 1
    float scale;
    float* y;                      // (B, T, N, V)
};

// The heads h .. h + G - 1 of one sequence. P: what the weight is kept in, Q: what the cache is
template <class P, class Q>
void latent_heads(const Latent& a, n_t b, n_t h, n_t G) {
    const n_t rows = G * a.T, length = a.places.lengths[b];  // row g T + t
    float* carried = floats(0, rows * a.C).data();
    float* turned = floats(1, rows * a.R).data();
    float* p = floats(2, rows * length).data();
    float* mixed = floats(3, rows * a.C).data();
    const auto* w = static_cast<const typename P::kept*>(a.weight);
    const auto* c = static_cast<const typename Q::kept*>(a.c);
    const auto* k = static_cast<const typename Q::kept*>(a.k_rope);
    for (n_t g = 0; g < G; ++g)
        for (n_t t = 0; t < a.T; ++t) {
            const n_t at = (b * a.T + t) * a.N + h + g, row = g * a.T + t;
            const float* q = a.q + at * (a.H + a.R);
            mix_all<P>(w + (h + g) * (a.H + a.V) * a.C, a.C, a.H, q, 0, 1, a.C, carried + row * a.C, 0, true);
            std::memcpy(turned + row * a.R, q + a.H, a.R * sizeof(float));
        }
    a.places.each(b, [&](n_t first, n_t count, n_t block) {
        float* to = p + first;
        products<Q>(c + block * a.c_block, a.c_row, 0, count, carried, a.C, rows, a.C,
                    [&](n_t s, n_t r, float sum) { to[r * length + s] = sum; });
        products<Q>(k + block * a.k_block, a.k_row, 0, count, turned, a.R, rows, a.R, [&](n_t s, n_t r, float sum) {
            to[r * length + s] = (to[r * length + s] + sum) * a.scale;
        });
    });
    for (n_t r = 0; r < rows; ++r) {
        const n_t t = r % a.T;
        const n_t seen = a.causal ? length - a.T + t + 1 : length;
        softmax(p + r * length, seen, a.mask ? a.mask + b * a.mask_batch + t * a.mask_row : nullptr);
        std::fill(p + r * length + seen, p + (r + 1) * length, 0.0f);
    }
    a.places.each(b, [&](n_t first, n_t count, n_t block) {
        mix_all<Q>(c + block * a.c_block, a.c_row, count, p + first, length, rows, a.C, mixed, a.C, first == 0);
    });
    for (n_t g = 0; g < G; ++g)
        products<P>(w + ((h + g) * (a.H + a.V) + a.H) * a.C, a.C, 0, a.V, mixed + g * a.T * a.C, a.C, a.T, a.C,
                    [&](n_t v, n_t t, float sum) { a.y[((b * a.T + t) * a.N + h + g) * a.V + v] = sum; });
}

template <class P, class Q>
void latent(const Latent& a, int threads) {
    const n_t work = a.B * a.N * a.T * (a.C * (a.H + a.V) + a.S * (2 * a.C + a.R));
    std::atomic<n_t> next{0};  // rows have different lengths
    team(threads, work, [&](int, int all) {
        // heads read the same cache: up to four together, as long as every thread has some
        const n_t together = std::max(n_t(1), std::min(n_t(4), a.B * a.N / all));
        const n_t groups = (a.N + together - 1) / together;
        for (n_t unit; (unit = next++) < a.B * groups;) {
            const n_t h = unit % groups * together;
            latent_heads<P, Q>(a, unit / groups, h, std::min(together, a.N - h));
        }
    });
}

// --- by kind --------------------------------------------------------------------------------------------------------

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

void product_of(int kind, const float* x, n_t m, n_t K, const void* weight, const float* scales, n_t N, float* y,
                int threads) {
    const auto run = kind == FLOAT32 ? product<Float32> : kind == BFLOAT16 ? product<BFloat16> : product<Int8>;
    run(x, m, K, weight, scales, N, K, y, threads);
}

void feed_of(int kind, const Network& net, const float* x, n_t n, const int64_t* chosen, const float* weights, n_t k,
             n_t E, n_t D, n_t I, float* y, bool add, int threads) {
    const auto run = kind == FLOAT32 ? feed<Float32> : kind == BFLOAT16 ? feed<BFloat16> : feed<Int8>;
    run(net, x, n, chosen, weights, k, E, D, I, y, add, threads);
}

void latent_of(int kind, int cache_kind, const Latent& a, int threads) {
    const auto run = kind == FLOAT32 ? cache_kind == FLOAT32 ? latent<Float32, Float32> : latent<Float32, BFloat16>
                     : cache_kind == FLOAT32 ? latent<BFloat16, Float32>
                                             : latent<BFloat16, BFloat16>;
    run(a, threads);
}

// rows of x and y begin x_row and D apart
template <class P>
void norm(const float* x, n_t m, n_t x_row, n_t D, const void* weight, float eps, float* y, int threads) {
    const auto* w = static_cast<const typename P::kept*>(weight);
    team(threads, m * D, [&](int thread, int all) {
        const Range mine = share(m, thread, all, 1);
        for (n_t j = mine.first; j < mine.last; ++j) {
            const float* from = x + j * x_row;
            float* to = y + j * D;
            Floats squares = {};
            n_t i = 0;
            for (; i + LANES <= D; i += LANES) {
                const Floats v = load<Floats>(from + i);
                squares += v * v;
            }
            float sum = total(squares);
            for (; i < D; ++i) sum += from[i] * from[i];
            const float r = 1 / std::sqrt(sum / D + eps);
            for (i = 0; i < D; ++i) to[i] = from[i] * r * P::one(w[i]);
        }
    });
}

void norm_of(int kind, const float* x, n_t m, n_t x_row, n_t D, const void* weight, float eps, float* y, int threads) {
    (kind == FLOAT32 ? norm<Float32> : norm<BFloat16>)(x, m, x_row, D, weight, eps, y, threads);
}

// one head (R): neighbours turned; y may be x
inline void turn(const float* x, n_t R, const float* cos, const float* sin, float* y) {
    for (n_t i = 0; i < R / 2; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        y[2 * i] = even * cos[i] - odd * sin[i];
        y[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
}

struct Choosing {
    n_t E, k;
    bool sigmoid, normalised;
    float scale;
    n_t groups, kept_groups;
    bool best_two;
};

// One token's logits (E) -> scores (E), chosen (k), weights (k); order (E) is scratch
void choose(const Choosing& c, const float* logits, const float* bias, float* scores, int64_t* chosen, float* weights,
            float* order) {
    const float never = -std::numeric_limits<float>::infinity();
    if (c.sigmoid) {
        for (n_t e = 0; e < c.E; ++e) scores[e] = 1 / (1 + exp_of(-logits[e]));
    } else {
        std::memcpy(scores, logits, c.E * sizeof(float));
        softmax(scores, c.E, nullptr);
    }
    for (n_t e = 0; e < c.E; ++e) order[e] = scores[e] + bias[e];
    if (c.groups > 1) {
        const n_t size = c.E / c.groups;
        std::vector<float> best(c.groups);
        for (n_t g = 0; g < c.groups; ++g) {
            float first = never, second = never;
            for (n_t e = g * size; e < (g + 1) * size; ++e) {
                second = std::max(second, std::min(first, order[e]));
                first = std::max(first, order[e]);
            }
            best[g] = c.best_two ? first + second : first;
        }
        std::vector<char> keep(c.groups, 0);
        for (n_t i = 0; i < c.kept_groups; ++i) {
            n_t g = -1;
            for (n_t other = 0; other < c.groups; ++other)
                if (!keep[other] && (g < 0 || best[other] > best[g])) g = other;
            keep[g] = 1;
        }
        for (n_t e = 0; e < c.E; ++e)
            if (!keep[e / size]) order[e] = never;
    }
    float sum = 0;
    std::vector<char> taken(c.E, 0);
    for (n_t i = 0; i < c.k; ++i) {
        n_t top = -1;
        for (n_t e = 0; e < c.E; ++e)
            if (!taken[e] && (top < 0 || order[e] > order[top])) top = e;
        taken[top] = 1;
        chosen[i] = top;
        weights[i] = scores[top];
        sum += scores[top];
    }
    for (n_t i = 0; i < c.k; ++i) weights[i] = (c.normalised ? weights[i] / (sum + 1e-20f) : weights[i]) * c.scale;
}

}  // namespace

extern "C" {

void fathom_product(int kind, const float* x, n_t m, n_t K, const void* weight, const float* scales, n_t N, float* y,
                    int threads) {
    product_of(kind, x, m, K, weight, scales, N, y, threads);
}

void fathom_network(int kind, const void* gate, const float* gate_scales, const void* up, const float* up_scales,
                    const void* down, const float* down_scales, const float* x, n_t n, n_t D, n_t I, float* y,
                    int threads) {
    const Network net{gate, up, down, gate_scales, up_scales, down_scales};
    feed_of(kind, net, x, n, nullptr, nullptr, 1, 1, D, I, y, false, threads);
}

// y = experts (+ the shared network, of width J > 0). router is of router_kind, everything else of kind
void fathom_mixture(int kind, int router_kind, const float* x, n_t n, n_t D, const void* router, const float* bias,
                    n_t E, n_t k, int sigmoid, int normalised, float scale, n_t groups, n_t kept_groups, int best_two,
                    const void* gate_up, const float* gate_up_scales, const void* down, const float* down_scales, n_t I,
                    const void* gate_s, const float* gate_s_scales, const void* up_s, const float* up_s_scales,
                    const void* down_s, const float* down_s_scales, n_t J, int64_t* chosen, float* weights,
                    float* scores, float* logits, float* y, int threads) {
    const Choosing choosing{E, k, sigmoid != 0, normalised != 0, scale, groups, kept_groups, best_two != 0};
    product_of(router_kind, x, n, D, router, nullptr, E, logits, threads);
    std::vector<float> order(E);
    for (n_t j = 0; j < n; ++j)
        choose(choosing, logits + j * E, bias, scores + j * E, chosen + j * k, weights + j * k, order.data());
    const size_t size = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1;
    const Network net{gate_up,        static_cast<const char*>(gate_up) + I * D * size,    down,
                      gate_up_scales, gate_up_scales ? gate_up_scales + I : gate_up_scales, down_scales};
    feed_of(kind, net, x, n, chosen, weights, k, E, D, I, y, false, threads);
    if (J) {
        const Network shared{gate_s, up_s, down_s, gate_s_scales, up_s_scales, down_s_scales};
        feed_of(kind, shared, x, n, nullptr, nullptr, 1, 1, D, J, y, true, threads);
    }
}

// x (m, D) -> q (m, N, H + R), c (m, C), k_rope (m, R); q_a of rank L > 0, or none; cos and sin (m, R / 2)
void fathom_latent_enter(int kind, int norm_kind, const float* x, n_t m, n_t D, const void* q_a,
                         const float* q_a_scales, const void* q_a_norm, n_t L, const void* q_b,
                         const float* q_b_scales, const void* kv_a, const float* kv_a_scales, const void* kv_a_norm,
                         float eps, n_t N, n_t H, n_t R, n_t C, const float* cos, const float* sin, float* q, float* c,
                         float* k_rope, int threads) {
    const float* from = x;
    if (L) {
        float* low = floats(4, m * L).data();
        product_of(kind, x, m, D, q_a, q_a_scales, L, low, threads);
        norm_of(norm_kind, low, m, L, L, q_a_norm, eps, low, threads);
        from = low;
    }
    product_of(kind, from, m, L ? L : D, q_b, q_b_scales, N * (H + R), q, threads);
    float* both = floats(5, m * (C + R)).data();
    product_of(kind, x, m, D, kv_a, kv_a_scales, C + R, both, threads);
    norm_of(norm_kind, both, m, C + R, C, kv_a_norm, eps, c, threads);
    for (n_t j = 0; j < m; ++j, cos += R / 2, sin += R / 2) {
        turn(both + j * (C + R) + C, R, cos, sin, k_rope + j * R);
        for (n_t h = 0; h < N; ++h) {
            float* head = q + (j * N + h) * (H + R) + H;
            turn(head, R, cos, sin, head);
        }
    }
}

// y (B T, D) = W_o of what the heads found in c (B, S, C) and k_rope (B, S, R)
void fathom_latent_leave(int kind, int kv_b_kind, int cache_kind, n_t B, n_t T, n_t S, n_t N, n_t H, n_t R, n_t V, n_t C,
                         const float* q, const void* c, n_t c_batch, n_t c_row, const void* k_rope, n_t k_batch,
                         n_t k_row, const void* kv_b, const uint8_t* mask, n_t mask_batch, n_t mask_row, int causal,
                         float scale, const void* o, const float* o_scales, n_t D, float* y, int threads) {
    float* heads = floats(6, B * T * N * V).data();
    std::vector<n_t> rows(B), lengths(B, S);  // a row is a block
    for (n_t b = 0; b < B; ++b) rows[b] = b;
    const Latent a{B,       T,     S,       N,     H,  R, V, C, q, c, k_rope, c_batch, c_row, k_batch, k_row,
                   {rows.data(), lengths.data(), 1, S}, kv_b, mask, mask_batch, mask_row, causal != 0, scale, heads};
    latent_of(kv_b_kind, cache_kind, a, threads);
    product_of(kind, heads, B * T, N * V, o, o_scales, D, y, threads);
}

// Everything of a layer; layers.py has the same fields
struct Layer {
    const void *norm, *q_a_norm, *kv_a_norm, *norm_after;
    const void* q_a;
    const float* q_a_scales;
    const void* q_b;
    const float* q_b_scales;
    const void* kv_a;
    const float* kv_a_scales;
    const void* kv_b;
    const void* o;
    const float* o_scales;
    void *c, *k_rope;  // the cache
    n_t c_block, c_row, k_block, k_row;
    n_t I, E, J;       // width of the network, or of E experts and of the shared network beside them
    const void* router;
    const float* bias;
    const void* gate;  // with experts [gate ; up] of all
    const float* gate_scales;
    const void* up;    // with experts, that of the shared network
    const float* up_scales;
    const void* down;
    const float* down_scales;
    const void* shared_gate;
    const float* shared_gate_scales;
    const void* shared_down;
    const float* shared_down_scales;
};

struct Sizes {
    n_t B, D, L, N, H, R, V, C, k, groups, kept_groups;
    Places places;  // of the new tokens too, which are the last of each row
    float eps, latent_eps, scale, weight_scale;
    int kind, norm_kind, kv_b_kind, router_kind, cache_kind, sigmoid, normalised, best_two;
};

// h (B, D): the embeddings of one new token a row, and then what the last layer leaves. Of every MoE layer in turn:
// chosen (B, k), weights (B, k), scores (B, E).
void fathom_layers(const Layer* layers, n_t count, const Sizes* sizes, float* h, const float* cos, const float* sin,
                   int64_t* chosen, float* weights, float* scores, int threads) {
    const Sizes& z = *sizes;
    const n_t B = z.B;
    float *x = floats(7, B * z.D).data(), *y = floats(8, B * z.D).data(), *q = floats(9, B * z.N * (z.H + z.R)).data();
    float *c = floats(10, B * z.C).data(), *k = floats(11, B * z.R).data();
    float* heads = floats(6, B * z.N * z.V).data();
    const n_t longest = *std::max_element(z.places.lengths, z.places.lengths + B);
    const auto put = z.cache_kind == FLOAT32 ? keep<Float32> : keep<BFloat16>;
    for (const Layer* layer = layers; layer < layers + count; ++layer) {
        const Layer& w = *layer;
        norm_of(z.norm_kind, h, B, z.D, z.D, w.norm, z.eps, x, threads);
        fathom_latent_enter(z.kind, z.norm_kind, x, B, z.D, w.q_a, w.q_a_scales, w.q_a_norm, z.L, w.q_b, w.q_b_scales,
                            w.kv_a, w.kv_a_scales, w.kv_a_norm, z.latent_eps, z.N, z.H, z.R, z.C, cos, sin, q, c, k,
                            threads);
        put(z.places, B, c, z.C, w.c, w.c_block, w.c_row);
        put(z.places, B, k, z.R, w.k_rope, w.k_block, w.k_row);
        const Latent a{B,       1,       longest, z.N,      z.H,    z.R,     z.V, z.C, q,     w.c,     w.k_rope, w.c_block,
                       w.c_row, w.k_block, w.k_row, z.places, w.kv_b, nullptr, 0,   0,   false, z.scale, heads};
        latent_of(z.kv_b_kind, z.cache_kind, a, threads);
        product_of(z.kind, heads, B, z.N * z.V, w.o, w.o_scales, z.D, y, threads);
        for (n_t i = 0; i < B * z.D; ++i) h[i] += y[i];
        norm_of(z.norm_kind, h, B, z.D, z.D, w.norm_after, z.eps, x, threads);
        if (w.E) {
            float* logits = floats(12, B * w.E).data();
            fathom_mixture(z.kind, z.router_kind, x, B, z.D, w.router, w.bias, w.E, z.k, z.sigmoid, z.normalised,
                           z.weight_scale, z.groups, z.kept_groups, z.best_two, w.gate, w.gate_scales, w.down,
                           w.down_scales, w.I, w.shared_gate, w.shared_gate_scales, w.up, w.up_scales, w.shared_down,
                           w.shared_down_scales, w.J, chosen, weights, scores, logits, y, threads);
            chosen += B * z.k;
            weights += B * z.k;
            scores += B * w.E;
        } else {
            fathom_network(z.kind, w.gate, w.gate_scales, w.up, w.up_scales, w.down, w.down_scales, x, B, z.D, w.I, y,
                           threads);
        }
        for (n_t i = 0; i < B * z.D; ++i) h[i] += y[i];
    }
}

void fathom_rms_norm(int kind, const float* x, n_t m, n_t D, const void* weight, float eps, float* y, int threads) {
    norm_of(kind, x, m, D, D, weight, eps, y, threads);
}

// x (m, N, R) with strides, cos and sin (m, R / 2)
void fathom_turn(const float* x, n_t m, n_t N, n_t R, n_t x_row, n_t x_head, const float* cos, const float* sin,
                 float* y, int threads) {
    team(threads, m * N * R, [&](int thread, int all) {
        const Range mine = share(m, thread, all, 1);
        for (n_t j = mine.first; j < mine.last; ++j)
            for (n_t h = 0; h < N; ++h)
                turn(x + j * x_row + h * x_head, R, cos + j * (R / 2), sin + j * (R / 2), y + (j * N + h) * R);
    });
}

}  // extern "C"
