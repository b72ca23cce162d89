/* Numbers and vectors of them, for the kernels. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

INLINE float wide(bf16 x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}

INLINE bf16 narrow(float x) { /* to nearest, ties to even */
    union { float value; uint32_t bits; } u = {x};
    uint32_t rounded = (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}

INLINE float exp_of(float x) { /* as in Cephes' expf; the relative error is below 2e-7 */
    x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float value; } scale = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * scale.value;
}

/* Fetch numbers that are read soon: rows are too short for the processor to foresee the next. Any address will do. */
INLINE void prefetch(const bf16 *x, int64_t num) {
    for (int64_t i = 0; i < num; i += 32) __builtin_prefetch(x + i);
}

/* Dot products of x with the first four of `num` rows, fewer where there are fewer. */
INLINE void dots(float *out, const bf16 *x, const bf16 *rows, int64_t num, int64_t size) {
#ifdef __AVX512BF16__
    if (num >= 4 && size % 32 == 0) {
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
        for (int64_t i = 0; i < size; i += 32) {
            const bf16 *row = rows + i;
            __m512bh a = (__m512bh)_mm512_loadu_si512(x + i);
            s0 = _mm512_dpbf16_ps(s0, a, (__m512bh)_mm512_loadu_si512(row));
            s1 = _mm512_dpbf16_ps(s1, a, (__m512bh)_mm512_loadu_si512(row + size));
            s2 = _mm512_dpbf16_ps(s2, a, (__m512bh)_mm512_loadu_si512(row + 2 * size));
            s3 = _mm512_dpbf16_ps(s3, a, (__m512bh)_mm512_loadu_si512(row + 3 * size));
        }
        /* The sums of all four at once: neighbours first, then the four parts of the vector. */
        __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(s0, s1), _mm512_unpackhi_ps(s0, s1));
        __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(s2, s3), _mm512_unpackhi_ps(s2, s3));
        __m512d first = _mm512_unpacklo_pd(_mm512_castps_pd(low), _mm512_castps_pd(high));
        __m512d second = _mm512_unpackhi_pd(_mm512_castps_pd(low), _mm512_castps_pd(high));
        __m512 parts = _mm512_add_ps(_mm512_castpd_ps(first), _mm512_castpd_ps(second));
        __m128 halves[2] = {_mm_add_ps(_mm512_castps512_ps128(parts), _mm512_extractf32x4_ps(parts, 1)),
                            _mm_add_ps(_mm512_extractf32x4_ps(parts, 2), _mm512_extractf32x4_ps(parts, 3))};
        _mm_storeu_ps(out, _mm_add_ps(halves[0], halves[1]));
        return;
    }
#endif
    for (int64_t j = 0; j < 4 && j < num; j++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += wide(x[i]) * wide(rows[j * size + i]);
        out[j] = sum;
    }
}

/* Adds to `sums` the first four of `num` rows times their weights, fewer where there are fewer. */
INLINE void add_rows(float *sums, const float *weights, const bf16 *rows, int64_t stride, int64_t num, int64_t size) {
    for (int64_t j = 0; num < 4 && j < num; j++)
#pragma omp simd
        for (int64_t i = 0; i < size; i++) sums[i] += weights[j] * wide(rows[j * stride + i]);
    if (num < 4) return;
    float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        sums[i] += w0 * wide(rows[i]) + w1 * wide(rows[stride + i]) + w2 * wide(rows[2 * stride + i]) +
                   w3 * wide(rows[3 * stride + i]);
}
