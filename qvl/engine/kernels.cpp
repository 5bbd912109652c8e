// Answers' next tokens on a CPU that multiplies bf16 itself (AVX512-BF16). kernels.py compiles and calls this file.
//
// A step reads every weight once, row after row as the checkpoint holds it: nothing is packed, nothing is copied, and
// all rows of the batch meet a weight while it is in a register. Sums are fp32; what one kernel hands to the next is
// bf16, as in the plain forward.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

using bf16 = uint16_t;

namespace {

constexpr int kWeights = 4;   // rows of a weight that are met together
constexpr int kChunk = 32;    // rows of a weight that a thread takes at a time
constexpr int kWidest = 128;  // widest head

inline __m512 widen(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

inline __m512 widen(const float* x) { return _mm512_loadu_ps(x); }

inline void narrow(bf16* x, __m512 value) { _mm256_storeu_si256((__m256i*)x, (__m256i)_mm512_cvtneps_pbh(value)); }

inline __m512bh load(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }

// Whole numbers up to 127 are bf16 numbers too.
inline __m512bh load(const int8_t* x) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x + 1)));
    return _mm512_cvtne2ps_pbh(high, low);
}

inline float widen_one(bf16 x) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((uint32_t)x << 16))); }

// Four registers to their four sums.
inline __m128 sums(const __m512 (&x)[4]) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, a polynomial of degree 6 (error 1e-7 of the value).
inline __m512 exp(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// ---- linear maps

// Rows of bf16, or of int8 with one scale a row.
struct Weight {
    const void* rows;
    const float* scale;  // null for bf16
};

// Few inputs: one row of the weight after another, so that memory is read in one stream, which the CPU sees coming, but
// for the next page of 4 KiB: that is asked for into the second cache (two threads, one row: 23 to 26 GB/s; asked for
// into the first cache 21).
template <int C, class Number>
inline void stream(const Number* weight, const bf16* x, int64_t width, __m128 (&out)[C]) {
    constexpr int kApart = C == 1 ? 4 : 2;  // sums of one output that do not wait for each other
    __m512 total[C][kWeights];
    for (int r = 0; r < kWeights; r++, weight += width) {
        __m512 sum[C][kApart];
        for (int c = 0; c < C; c++)
            for (int u = 0; u < kApart; u++) sum[c][u] = _mm512_setzero_ps();
        for (int64_t k = 0; k < width; k += 32 * kApart)
#pragma GCC unroll 4
            for (int u = 0; u < kApart; u++) {
                _mm_prefetch((const char*)(weight + k + 32 * u) + 4096, _MM_HINT_T1);
                __m512bh w = load(weight + k + 32 * u);
#pragma GCC unroll 4
                for (int c = 0; c < C; c++)
                    sum[c][u] = _mm512_dpbf16_ps(sum[c][u], w, load(x + c * width + k + 32 * u));
            }
        for (int c = 0; c < C; c++) {
            total[c][r] = sum[c][0];
            for (int u = 1; u < kApart; u++) total[c][r] = _mm512_add_ps(total[c][r], sum[c][u]);
        }
    }
    for (int c = 0; c < C; c++) out[c] = sums(total[c]);
}

// Many inputs: four rows of the weight meet C of x in registers, and A rows of the next weights are asked for
// meanwhile. They wait in the second cache, not the first, which the inputs fill (8 rows of 1024: 16.7 GB/s so, 9.3 the
// other way, 12.6 in oneDNN's own order).
template <int C, int A>
inline void tile(const bf16* weight, const bf16* x, int64_t width, const bf16* next, __m128 (&out)[C]) {
    __m512 sum[C][kWeights];
    for (int c = 0; c < C; c++)
        for (int r = 0; r < kWeights; r++) sum[c][r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += 32) {
        __m512bh v[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) v[c] = load(x + c * width + k);
#pragma GCC unroll 4
        for (int a = 0; a < A; a++) _mm_prefetch((const char*)(next + A * k + 32 * a), _MM_HINT_T1);
#pragma GCC unroll 4
        for (int r = 0; r < kWeights; r++) {
            __m512bh w = load(weight + r * width + k);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[c][r] = _mm512_dpbf16_ps(sum[c][r], w, v[c]);
        }
    }
    for (int c = 0; c < C; c++) out[c] = sums(sum[c]);
}

template <int N>
using Int = std::integral_constant<int, N>;

// emit(m, value): the four outputs of row m of x for four neighbouring rows of a weight, few inputs.
template <class Number, class Emit>
inline void few(const Number* weight, const bf16* x, int64_t rows, int64_t width, Emit emit) {
    auto run = [&](auto count) {
        __m128 out[decltype(count)::value];
        stream(weight, x, width, out);
        for (int c = 0; c < decltype(count)::value; c++) emit(c, out[c]);
    };
    if (rows == 1) run(Int<1>());
    if (rows == 2) run(Int<2>());
    if (rows == 3) run(Int<3>());
}

// The same for four inputs and more. `next` is what to ask memory for meanwhile, four rows in all, spread over the
// passes.
template <class Emit>
inline void many(const bf16* weight, const bf16* x, int64_t rows, int64_t width, const bf16* next, Emit emit) {
    int64_t m = 0;
    auto run = [&](auto count, auto ahead) {
        constexpr int C = decltype(count)::value, A = decltype(ahead)::value;
        __m128 out[C];
        tile<C, A>(weight, x + m * width, width, next, out);
        for (int c = 0; c < C; c++) emit(m + c, out[c]);
        m += C;
        next += A * width;
    };
    if (!next) {
    } else if (rows < 8) {
        run(Int<4>(), Int<4>());
    } else if (rows < 16) {
        run(Int<4>(), Int<2>()), run(Int<4>(), Int<2>());
    } else {
        for (int i = 0; i < 4; i++) run(Int<4>(), Int<1>());
    }
    while (m + 4 <= rows) run(Int<4>(), Int<0>());
    if (rows - m == 3) run(Int<3>(), Int<0>());
    if (rows - m == 2) run(Int<2>(), Int<0>());
    if (rows - m == 1) run(Int<1>(), Int<0>());
}

// Rows [n, n + 4) of a weight of either kind.
template <class Emit>
inline void four_rows(Weight weight, int64_t n, const bf16* x, int64_t rows, int64_t width, Emit emit) {
    if (!weight.scale) {
        const bf16* from = (const bf16*)weight.rows + n * width;
        return rows < 4 ? few(from, x, rows, width, emit) : many(from, x, rows, width, from + kWeights * width, emit);
    }
    const int8_t* from = (const int8_t*)weight.rows + n * width;
    __m128 scale = _mm_loadu_ps(weight.scale + n);
    auto scaled = [&](int64_t m, __m128 value) { emit(m, _mm_mul_ps(value, scale)); };
    if (rows < 4) return few(from, x, rows, width, scaled);
    // Widened once for all inputs.
    static thread_local std::vector<bf16> wide;
    wide.resize(kWeights * width);
    for (int64_t k = 0; k < kWeights * width; k += 32) {
        _mm_prefetch((const char*)(from + kWeights * width + k), _MM_HINT_T1);
        _mm512_storeu_si512(&wide[k], (__m512i)load(from + k));
    }
    many(wide.data(), x, rows, width, nullptr, scaled);
}

inline void store(bf16* out, __m128 value) { _mm_storel_epi64((__m128i*)out, (__m128i)_mm_cvtneps_pbh(value)); }

inline __m128 fetch(const bf16* x) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)x)), 16));
}

// out (rows, outputs) [low, high) = x (rows, width) weight^T, plus what stands in out where `add`.
inline void linear(Weight weight, const bf16* x, bf16* out, int64_t rows, int64_t width, int64_t outputs, int64_t low,
                   int64_t high, bool add) {
    for (int64_t n = low; n < high; n += kWeights)
        four_rows(weight, n, x, rows, width, [&](int64_t m, __m128 value) {
            bf16* to = out + m * outputs + n;
            store(to, add ? _mm_add_ps(fetch(to), value) : value);
        });
}

// x / (1 + e^-x); with e^-|x| nothing overflows.
inline __m512 silu(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f), e = exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    __m512 part = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), e, one);
    return _mm512_mul_ps(x, _mm512_div_ps(part, _mm512_add_ps(one, e)));
}

// out [low, high) = silu(gate x) * (up x)
inline void gated(Weight gate, Weight up, const bf16* x, bf16* out, int64_t rows, int64_t width, int64_t inner,
                  int64_t low, int64_t high) {
    for (int64_t n = low; n < high; n += kWeights) {
        four_rows(gate, n, x, rows, width, [&](int64_t m, __m128 value) { store(out + m * inner + n, value); });
        four_rows(up, n, x, rows, width, [&](int64_t m, __m128 value) {
            bf16* to = out + m * inner + n;
            store(to, _mm_mul_ps(_mm512_castps512_ps128(silu(_mm512_castps128_ps512(fetch(to)))), value));
        });
    }
}

// ---- norms and rotation

inline float inverse_rms(const bf16* x, int64_t width, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += 16) {
        __m512 v = widen(x + d);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / width + eps);
}

inline void norm(const bf16* x, const bf16* weight, bf16* out, int64_t width, float eps) {
    __m512 scale = _mm512_set1_ps(inverse_rms(x, width, eps));
    for (int64_t d = 0; d < width; d += 16)
        narrow(out + d, _mm512_mul_ps(_mm512_mul_ps(widen(x + d), scale), widen(weight + d)));
}

// (a, b) -> (a cos - b sin, b cos + a sin) of one head; in place too.
template <class Angle>
inline void rotate(const bf16* x, const Angle* cos, const Angle* sin, bf16* out, int64_t width) {
    int64_t half = width / 2;
    for (int64_t h = 0; h < half; h += 16) {
        __m512 a = widen(x + h), b = widen(x + half + h), c = widen(cos + h), s = widen(sin + h);
        narrow(out + h, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        narrow(out + half + h, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

inline void norm_and_rotate(const bf16* x, const bf16* weight, const bf16* cos, const bf16* sin, bf16* out,
                            int64_t width, float eps) {
    bf16 normed[kWidest];
    norm(x, weight, normed, width, eps);
    rotate(normed, cos, sin, out, width);
}

struct Shape {
    int64_t layers, width, inner, heads, kv_heads, head_width, slots, block_size;
    float eps;
};

struct Rotation {
    const bf16 *q_norm, *k_norm, *cos, *sin;
    const int64_t* slot;
    bf16 *q, *k, *v, *key, *value;
};

// One head of one row: of the query in place, or of the key, which goes into its slot with the value.
inline void place(const Shape& s, const Rotation& r, int64_t m, int64_t n) {
    const int64_t H = s.head_width;
    const bf16 *cos = r.cos + m * H, *sin = r.sin + m * H;
    if (n < s.heads) {
        bf16* q = r.q + (m * s.heads + n) * H;
        return norm_and_rotate(q, r.q_norm, cos, sin, q, H, s.eps);
    }
    int64_t from = (m * s.kv_heads + n - s.heads) * H, to = ((n - s.heads) * s.slots + r.slot[m]) * H;
    norm_and_rotate(r.k + from, r.k_norm, cos, sin, r.key + to, H, s.eps);
    std::copy_n(r.v + from, H, r.value + to);
}

// ---- attention

// One query head over one block of keys and values: a running softmax (top, total, mixed).
struct Running {
    float top, total;
    float mixed[kWidest];
};

template <int W>  // head width / 32
inline void meet(Running& state, const bf16* q, const bf16* key, const bf16* value, int64_t count, float scale,
                 float* score) {
    constexpr int64_t width = W * 32;
    __m512bh query[W];
    for (int i = 0; i < W; i++) query[i] = load(q + 32 * i);
    for (int64_t j = 0; j < count; j += 4) {
        __m512 sum[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            const bf16* k = key + std::min(j + c, count - 1) * width;
            sum[c] = _mm512_setzero_ps();
#pragma GCC unroll 8
            for (int i = 0; i < W; i++) sum[c] = _mm512_dpbf16_ps(sum[c], query[i], load(k + 32 * i));
        }
        _mm_storeu_ps(score + j, _mm_mul_ps(sums(sum), _mm_set1_ps(scale)));
    }
    float top = state.top;
    for (int64_t j = 0; j < count; j++) top = std::max(top, score[j]);
    for (int64_t j = count; j % 16; j++) score[j] = -INFINITY;
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16) {
        __m512 weight = exp(_mm512_sub_ps(_mm512_loadu_ps(score + j), _mm512_set1_ps(top)));
        weight = _mm512_maskz_mov_ps(count - j >= 16 ? 0xFFFF : (1 << (count - j)) - 1, weight);
        _mm512_storeu_ps(score + j, weight);
        total = _mm512_add_ps(total, weight);
    }
    float shrink = std::exp(state.top - top);
    state.top = top;
    state.total = state.total * shrink + _mm512_reduce_add_ps(total);
    __m512 mixed[2 * W];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * W; i++)
        mixed[i] = _mm512_mul_ps(_mm512_loadu_ps(state.mixed + 16 * i), _mm512_set1_ps(shrink));
    for (int64_t j = 0; j < count; j++) {
        __m512 weight = _mm512_set1_ps(score[j]);
#pragma GCC unroll 16
        for (int i = 0; i < 2 * W; i++) mixed[i] = _mm512_fmadd_ps(weight, widen(value + j * width + 16 * i), mixed[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * W; i++) _mm512_storeu_ps(state.mixed + 16 * i, mixed[i]);
}

// The query heads of one key head, over all blocks of one answer.
template <int W>
void attend(const bf16* q, const bf16* key, const bf16* value, const int64_t* blocks, int64_t context,
            int64_t block_size, int64_t groups, bf16* out, std::vector<float>& score) {
    constexpr int64_t width = W * 32;
    std::vector<Running> states(groups);
    for (Running& s : states) {
        s.top = -INFINITY, s.total = 0;
        std::fill(s.mixed, s.mixed + width, 0.0f);
    }
    for (int64_t start = 0; start < context; start += block_size) {
        int64_t at = blocks[start / block_size] * block_size * width, count = std::min(block_size, context - start);
        // The block's keys are read from memory for the first head and found in cache by the others.
        for (int64_t g = 0; g < groups; g++)
            meet<W>(states[g], q + g * width, key + at, value + at, count, 1.0f / std::sqrt((float)width),
                    score.data());
    }
    for (int64_t g = 0; g < groups; g++) {
        __m512 scale = _mm512_set1_ps(1.0f / states[g].total);
        for (int64_t h = 0; h < width; h += 16)
            narrow(out + g * width + h, _mm512_mul_ps(_mm512_loadu_ps(states[g].mixed + h), scale));
    }
}

// ---- attention of many queries

// A block of queries meets tiles of 64 keys. Keys and values are laid in pairs, as the multiplier wants them: of
// neighbouring numbers of a key, of neighbouring tokens of a value. The rows of a block are (query, head of its group)
// in turn, so that heads that share keys share work.
constexpr int kTile = 64, kTogether = 6, kRows = 48;
constexpr float kAbove = 8;

// out (6, 64) = or += a (6, 2 * pairs) b, where b is (pairs, columns, 2) and 64 of its columns are met. aside(p): other
// work that is woven in, because the CPU looks too few instructions ahead to find it behind the last pair.
template <class Aside>
inline void multiply(const bf16* a, int64_t a_row, const bf16* b, int64_t columns, int64_t pairs, float* out,
                     int64_t out_row, bool add, Aside aside) {
    __m512 sum[kTogether][4];
#pragma GCC unroll 6
    for (int r = 0; r < kTogether; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sum[r][c] = add ? _mm512_loadu_ps(out + r * out_row + 16 * c) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh w[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) w[c] = load(b + (p * columns + 16 * c) * 2);
#pragma GCC unroll 6
        for (int r = 0; r < kTogether; r++) {
            __m512bh v = (__m512bh)_mm512_set1_epi32(*(const int*)(a + r * a_row + 2 * p));
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], v, w[c]);
        }
        aside(p);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTogether; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(out + r * out_row + 16 * c, sum[r][c]);
}

// 64 keys, of which `count` are there: (width / 2, 64, 2)
inline void pair_keys(const bf16* key, int64_t row, int64_t width, int64_t count, bf16* out) {
    uint32_t* to = (uint32_t*)out;
    for (int64_t j = 0; j < kTile; j++)
        for (int64_t p = 0; p < width / 2; p++)
            to[p * kTile + j] = j < count ? *(const uint32_t*)(key + j * row + 2 * p) : 0;
}

// 64 values: (32, width, 2), in the order in which soften() leaves their weights.
inline void pair_values(const bf16* value, int64_t row, int64_t width, int64_t count, bf16* out) {
    alignas(64) int16_t order[64];  // a0 b0 a1 b1 ...
    for (int i = 0; i < 64; i++) order[i] = i / 2 + i % 2 * 32;
    const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32), none = _mm512_setzero_si512();
    for (int64_t i = 0; i < kTile; i += 2) {
        // Four of the first sixteen, four of the next, and so on.
        int64_t j = i / 32 * 32 + i % 8 / 4 * 16 + i % 32 / 8 * 4 + i % 4;
        for (int64_t h = 0; h < width; h += 32, out += 64) {
            const bf16* at = value + j * row + h;
            __m512i a = j < count ? _mm512_loadu_si512(at) : none, b = j + 1 < count ? _mm512_loadu_si512(at + row) : none;
            _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

struct Queries {
    alignas(64) bf16 query[kRows * 128];
    alignas(64) float score[2][kTogether * kTile];  // of six rows, and of the six before
    alignas(64) bf16 weight[kTogether * kTile];
    alignas(64) float mixed[kRows * 128];
    alignas(64) float total[kRows * 16];  // in sixteen parts
    float top[kRows], shift[kRows];
    int64_t last[kRows];  // the last key that a row sees
};

// Weights are powers of two of scores, and bf16: 128 to a doubling, as many as the format has numbers. Scores become whole
// numbers of 128ths, the lower seven bits of which a table turns into the fraction; the upper ones are the exponent as
// they stand. Rounding adds to a weight about what rounding to bf16 does (0.3 % at most), and the total is of the weights as
// rounded.
struct Powers {
    alignas(64) uint16_t fraction[128];
    float scale;  // of a score: to 128ths of a power of two
    explicit Powers(int64_t width) : scale(128 * 1.44269504f / std::sqrt((float)width)) {
        for (int i = 0; i < 128; i++) fraction[i] = (uint16_t)std::lround(128 * (std::exp2(i / 128.0) - 1));
    }
};

inline void set_top(Queries& s, int64_t r, float top) {  // in 128ths
    s.top[r] = top;
    s.shift[r] = 127 * 128 - top;
}

// Scores of one row for 64 keys, of which it sees the first `seen`, before they are softened. Its top moves only when a
// score is more than kAbove over it, so that the largest of 64 scores need not be found for each row: weights up to
// 2^kAbove do no harm. A score that is no number makes none of the row's total and mixed.
inline void look(Queries& s, int64_t r, float* score, int64_t seen, int64_t width, float scale) {
    __m512 x[4], limit = _mm512_set1_ps((s.top[r] + 128 * kAbove) / scale);
    __mmask16 is_above = 0, is_none = 0;
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        x[c] = _mm512_load_ps(score + 16 * c);
        if (seen < kTile) {
            __mmask16 sees = (1 << std::clamp<int64_t>(seen - 16 * c, 0, 16)) - 1;
            x[c] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), sees, x[c]);
            _mm512_store_ps(score + 16 * c, x[c]);
        }
        is_above |= _mm512_cmp_ps_mask(x[c], limit, _CMP_NLE_UQ);
    }
    if (!is_above) return;
    for (int c = 0; c < 4; c++) is_none |= _mm512_cmp_ps_mask(x[c], x[c], _CMP_UNORD_Q);
    __m512 high = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
    float top = is_none ? NAN : _mm512_reduce_max_ps(high) * scale;
    __m512 shrink = _mm512_set1_ps(std::exp2((s.top[r] - top) / 128));
    set_top(s, r, top);
    float *total = s.total + 16 * r, *mixed = s.mixed + 128 * r;
    _mm512_store_ps(total, _mm512_mul_ps(_mm512_load_ps(total), shrink));
    for (int64_t h = 0; h < width; h += 16)
        _mm512_store_ps(mixed + h, _mm512_mul_ps(_mm512_load_ps(mixed + h), shrink));
}

// The weights [32 i, 32 i + 32) of six rows from `first` on, and their part in the totals. What is far below the top, -inf
// and NaN too, weighs nothing.
inline void soften(Queries& s, int64_t first, int64_t i, const float* score, const Powers* powers) {
    asm volatile("" : "+r"(powers));  // read anew, so that multiply() keeps its registers
    int64_t r = first + i / 2;
    __m512 scale = _mm512_set1_ps(powers->scale), shift = _mm512_set1_ps(s.shift[r]);
    auto steps = [&](const float* x) { return _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_load_ps(x), scale, shift)); };
    __m512i whole = _mm512_packus_epi32(steps(score + 32 * i), steps(score + 32 * i + 16));
    auto half = [&](const uint16_t* of) {  // of the table, by six bits
        return _mm512_permutex2var_epi16(_mm512_load_si512(of), whole, _mm512_load_si512(of + 32));
    };
    __mmask32 is_upper = _mm512_test_epi16_mask(whole, _mm512_set1_epi16(64));
    __m512i part = _mm512_mask_mov_epi16(half(powers->fraction), is_upper, half(powers->fraction + 64));
    __m512i weight = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x7F), part, whole, 0xCA);  // 7 bits of part, 9 of whole
    _mm512_store_si512(s.weight + 32 * i, weight);
    float* total = s.total + 16 * r;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    _mm512_store_ps(total, _mm512_dpbf16_ps(_mm512_load_ps(total), (__m512bh)weight, ones));
}

}  // namespace

extern "C" {

struct Layer {
    Weight q, k, v, o, gate, up, down;
    const bf16 *q_norm, *k_norm, *norm_in, *norm_mlp;
    bf16 *key, *value;  // of this layer's pool: (kv heads, blocks * block_size, head width)
};

// x (rows, width) goes through all layers and the last norm, in place. One token of one answer a row: `slot` is where
// its key and value go, `context` how many tokens it sees, itself included, `blocks` (rows, most_blocks) where they
// lie. `scratch` holds rows * (width + (2 heads + 2 kv_heads) * head_width + inner) numbers.
void decode(const Shape* shape, const Layer* layers, const bf16* last_norm, int64_t rows, bf16* x, const bf16* cos,
            const bf16* sin, const int64_t* slot, const int64_t* context, const int64_t* blocks, int64_t most_blocks,
            bf16* scratch, int threads) {
    const Shape s = *shape;
    const int64_t H = s.head_width, q_out = s.heads * H, kv_out = s.kv_heads * H, groups = s.heads / s.kv_heads;
    bf16 *normed = scratch, *q = normed + rows * s.width, *k = q + rows * q_out, *v = k + rows * kv_out,
         *mixed = v + rows * kv_out, *inner = mixed + rows * q_out;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> score(s.block_size + 16);
        for (const Layer* layer = layers; layer < layers + s.layers; layer++) {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < rows; m++)
                norm(x + m * s.width, layer->norm_in, normed + m * s.width, s.width, s.eps);
#pragma omp for schedule(dynamic)
            for (int64_t low = 0; low < q_out + 2 * kv_out; low += kChunk) {
                // q, k and v one after another; kChunk divides each
                bool is_q = low < q_out, is_k = low < q_out + kv_out;
                Weight weight = is_q ? layer->q : is_k ? layer->k : layer->v;
                int64_t first = low - (is_q ? 0 : is_k ? q_out : q_out + kv_out);
                bf16* to = is_q ? q : is_k ? k : v;
                linear(weight, normed, to, rows, s.width, is_q ? q_out : kv_out, first, first + kChunk, false);
            }
#pragma omp for schedule(static) collapse(2)
            for (int64_t m = 0; m < rows; m++)
                for (int64_t n = 0; n < s.heads + s.kv_heads; n++)
                    place(s, {layer->q_norm, layer->k_norm, cos, sin, slot, q, k, v, layer->key, layer->value}, m, n);
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t m = 0; m < rows; m++)
                for (int64_t head = 0; head < s.kv_heads; head++) {
                    int64_t at = m * q_out + head * groups * H, pool = head * s.slots * H;
                    auto one = H == 128 ? attend<4> : attend<2>;
                    one(q + at, layer->key + pool, layer->value + pool, blocks + m * most_blocks, context[m],
                        s.block_size, groups, mixed + at, score);
                }
#pragma omp for schedule(dynamic)
            for (int64_t low = 0; low < s.width; low += kChunk)
                linear(layer->o, mixed, x, rows, q_out, s.width, low, low + kChunk, true);
#pragma omp for schedule(static)
            for (int64_t m = 0; m < rows; m++)
                norm(x + m * s.width, layer->norm_mlp, normed + m * s.width, s.width, s.eps);
#pragma omp for schedule(dynamic)
            for (int64_t low = 0; low < s.inner; low += kChunk)
                gated(layer->gate, layer->up, normed, inner, rows, s.width, s.inner, low, low + kChunk);
#pragma omp for schedule(dynamic)
            for (int64_t low = 0; low < s.width; low += kChunk)
                linear(layer->down, inner, x, rows, s.inner, s.width, low, low + kChunk, true);
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++) norm(x + m * s.width, last_norm, x + m * s.width, s.width, s.eps);
    }
}

// out (rows, outputs) = x (rows, width) weight^T: the head.
void project(const void* weight, const float* scale, const bf16* x, bf16* out, int64_t rows, int64_t width,
             int64_t outputs, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t low = 0; low < outputs; low += kChunk)
        linear({weight, scale}, x, out, rows, width, outputs, low, std::min(low + kChunk, outputs), false);
}

// Queries (count, heads, width) of one sequence, the last `count` of its `total` tokens and `q_row` apart, over its keys
// and values, which lie `row` apart from token to token and `head` apart from head to head. Each sees what is not behind
// it, or everything where not `causal`. `scratch` holds 2 * width * (total rounded up to 64) numbers.
void attend_many(const bf16* q, const bf16* key, const bf16* value, bf16* out, int64_t count, int64_t total,
                 int64_t heads, int64_t kv_heads, int64_t width, int64_t q_row, int64_t row, int64_t head, int64_t causal,
                 bf16* scratch, int threads) {
    const int64_t groups = heads / kv_heads, tiles = (total + kTile - 1) / kTile, rows = count * groups,
                  tile_size = kTile * width;
    const Powers powers(width);
    bf16 *keys = scratch, *values = scratch + tiles * tile_size;
#pragma omp parallel num_threads(threads)
    {
        Queries* s = new (std::align_val_t(64)) Queries;
        for (int64_t n = 0; n < kv_heads; n++) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t++) {
                int64_t from = n * head + t * kTile * row, there = std::min<int64_t>(kTile, total - t * kTile);
                pair_keys(key + from, row, width, there, keys + t * tile_size);
                pair_values(value + from, row, width, there, values + t * tile_size);
            }
            // From the last block, which sees the most, so that no thread is left with a long one.
#pragma omp for schedule(dynamic)
            for (int64_t first = (rows - 1) / kRows * kRows; first >= 0; first -= kRows) {
                for (int64_t r = 0; r < kRows; r++) {
                    int64_t at = std::min(first + r, rows - 1), token = at / groups;
                    std::copy_n(q + token * q_row + (n * groups + at % groups) * width, width, s->query + r * width);
                    s->last[r] = causal ? total - count + token : total - 1;
                    set_top(*s, r, -INFINITY);
                }
                std::fill_n(s->mixed, kRows * 128, 0.0f);
                std::fill_n(s->total, kRows * 16, 0.0f);
                // Six rows meet a tile at a time. While their values are mixed, the next six's scores are there already, and
                // while these were made the weights were.
                const int64_t sixes = kRows / kTogether, steps = (s->last[kRows - 1] / kTile + 1) * sixes;
                auto nothing = [](int64_t) {};
                auto make_scores = [&](int64_t step, auto aside) {
                    const bf16* tile = keys + step / sixes * tile_size;
                    multiply(s->query + step % sixes * kTogether * width, width, tile, kTile, width / 2,
                             s->score[step % 2], kTile, false, aside);
                };
                make_scores(0, nothing);
                for (int64_t step = 0; step < steps; step++) {
                    const int64_t t = step / sixes, r = step % sixes * kTogether;
                    float* score = s->score[step % 2];
                    for (int64_t i = 0; i < kTogether; i++)
                        look(*s, r + i, score + i * kTile, s->last[r + i] + 1 - t * kTile, width, powers.scale);
                    auto weigh = [&](int64_t i) {
                        if (i < 2 * kTogether) soften(*s, r, i, score, &powers);
                    };
                    if (step + 1 < steps) {
                        make_scores(step + 1, weigh);
                    } else {
                        for (int64_t i = 0; i < 2 * kTogether; i++) weigh(i);
                    }
                    for (int64_t h = 0; h < width; h += 64)
                        multiply(s->weight, kTile, values + t * tile_size + 2 * h, width, kTile / 2,
                                 s->mixed + r * 128 + h, 128, true, nothing);
                }
                for (int64_t r = 0; r < std::min<int64_t>(kRows, rows - first); r++) {
                    bf16* to = out + ((first + r) / groups * heads + n * groups + (first + r) % groups) * width;
                    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(s->total + 16 * r)));
                    for (int64_t h = 0; h < width; h += 16)
                        narrow(to + h, _mm512_mul_ps(_mm512_load_ps(s->mixed + r * 128 + h), share));
                }
            }
        }
        operator delete(s, std::align_val_t(64));
    }
}

// ---- what lies between the matmuls of a prompt

void norm_rows(const bf16* x, const bf16* weight, bf16* out, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < rows; m++) norm(x + m * width, weight, out + m * width, width, eps);
}

void place_rows(const Shape* shape, const bf16* q_norm, const bf16* k_norm, const bf16* cos, const bf16* sin,
                const int64_t* slot, bf16* q, bf16* k, bf16* v, bf16* key, bf16* value, int64_t rows, int threads) {
    const Rotation rotation = {q_norm, k_norm, cos, sin, slot, q, k, v, key, value};
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < shape->heads + shape->kv_heads; n++) place(*shape, rotation, m, n);
}

// The first `heads` of each row of x, in place; cos and sin (rows, width), the second half as the first.
void turn_rows(bf16* x, const float* cos, const float* sin, int64_t rows, int64_t row, int64_t heads, int64_t width,
               int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < rows; m++)
        for (bf16* a = x + m * row; a < x + m * row + heads * width; a += width)
            rotate(a, cos + m * width, sin + m * width, a, width);
}

// gate = silu(gate) * up
void gate_rows(bf16* gate, const bf16* up, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = m * width; i < (m + 1) * width; i += 16)
            narrow(gate + i, _mm512_mul_ps(silu(widen(gate + i)), widen(up + i)));
}

// For each row of logits the likeliest token and its logprob; NaN where a number is not finite.
void best(const bf16* logits, int64_t rows, int64_t outputs, int64_t* token, float* logprob, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < rows; m++) {
        const bf16* x = logits + m * outputs;
        const int64_t whole = outputs / 16 * 16;
        float high = -INFINITY, sum = 0;
        bool is_finite = true;
        for (int64_t i = 0; i < outputs; i++) is_finite &= (x[i] & 0x7F80) != 0x7F80;
        __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (int64_t i = 0; i < whole; i += 16) top = _mm512_max_ps(top, widen(x + i));
        high = _mm512_reduce_max_ps(top);
        for (int64_t i = whole; i < outputs; i++) high = std::max(high, widen_one(x[i]));
        for (int64_t i = 0; i < whole; i += 16)
            total = _mm512_add_ps(total, exp(_mm512_sub_ps(widen(x + i), _mm512_set1_ps(high))));
        sum = _mm512_reduce_add_ps(total);
        for (int64_t i = whole; i < outputs; i++) sum += std::exp(widen_one(x[i]) - high);
        int64_t at = 0;
        while (at + 1 < outputs && widen_one(x[at]) != high) at++;
        token[m] = at;
        logprob[m] = is_finite ? -std::log(sum) : NAN;
    }
}
}
