/* What lies between the matrix products of a decoder layer, in bf16 on a CPU. torch does it in some twenty calls, each
   of which takes longer to start than to compute when few tokens are read. Sums are fp32; tensors are contiguous where
   nothing else is said. `cpu_kernels.py` compiles this file for the processor at hand and calls it. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define NUM_KEYS 128    /* of a block: that many scores are kept at a time */
#define MAX_GROUP 32    /* query heads of a key head; the limits are checked by the caller */
#define MAX_SIZE 256    /* of a head */
#define NUM_COLUMNS 256 /* of an output that are computed at a time */
#define FEW 16384       /* numbers for which a second thread does not pay */

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

/* Dot products of `a` with the first four of `num` rows, fewer where there are fewer. */
INLINE void dots(float *out, const float *a, const bf16 *rows, int64_t stride, int64_t num, int64_t size) {
    for (int64_t j = 0; num < 4 && j < num; j++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += a[i] * wide(rows[j * stride + i]);
        out[j] = sum;
    }
    if (num < 4) return;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < size; i++) {
        float x = a[i];
        s0 += x * wide(rows[i]), s1 += x * wide(rows[stride + i]);
        s2 += x * wide(rows[2 * stride + i]), s3 += x * wide(rows[3 * stride + i]);
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
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

INLINE void normed(bf16 *out, const bf16 *x, const bf16 *weight, float eps, int64_t width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += wide(x[i]) * wide(x[i]);
    float scale = 1.0f / sqrtf(sum / width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) out[i] = narrow(wide(x[i]) * scale * wide(weight[i]));
}

/* Root mean square norm of x [tokens, width]. */
void rms_norm(bf16 *out, const bf16 *x, const bf16 *weight, double eps, int64_t num_tokens, int64_t width) {
#pragma omp parallel for if (num_tokens * width > FEW)
    for (int64_t t = 0; t < num_tokens; t++) normed(out + t * width, x + t * width, weight, eps, width);
}

/* silu(gate) * up of [tokens, 2 * width], where gate and up lie side by side. */
void silu_mul(bf16 *out, const bf16 *gate_up, int64_t num_tokens, int64_t width) {
#pragma omp parallel for if (num_tokens * width > FEW / 2)
    for (int64_t t = 0; t < num_tokens; t++) {
        const bf16 *gate = gate_up + t * 2 * width, *up = gate + width;
        bf16 *o = out + t * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = wide(gate[i]);
            o[i] = narrow(g / (1.0f + exp_of(-g)) * wide(up[i]));
        }
    }
}

/* Rotary embedding of the first heads of x [tokens, row], in place; with the norms [heads, size] before it, or null. */
void rotate(bf16 *x, const bf16 *cosine, const bf16 *sine, const bf16 *norms, double eps, int64_t num_tokens,
            int64_t row, int64_t num_heads, int64_t size) {
    int64_t half = size / 2;
#pragma omp parallel for if (num_tokens * row > FEW)
    for (int64_t t = 0; t < num_tokens; t++) {
        const bf16 *c = cosine + t * size, *s = sine + t * size;
        for (int64_t h = 0; h < num_heads; h++) {
            bf16 *a = x + t * row + h * size, *b = a + half;
            if (norms) normed(a, a, norms + h * size, eps, size);
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float first = wide(a[i]), second = wide(b[i]);
                a[i] = narrow(first * wide(c[i]) - second * wide(s[i]));
                b[i] = narrow(second * wide(c[half + i]) + first * wide(s[half + i]));
            }
        }
    }
}

/* The query heads of one key head, in blocks of keys with a running maximum (Milakov & Gimelshein 2018); `next_keys`
   are read after these. */
INLINE void attend_group(bf16 *out, const bf16 *query, const bf16 *keys, const bf16 *values, const bf16 *next_keys,
                         int64_t first, int64_t last, float scale, int64_t group, int64_t size) {
    float q[MAX_GROUP][MAX_SIZE], sums[MAX_GROUP][MAX_SIZE], p[MAX_GROUP][NUM_KEYS], most[MAX_GROUP], total[MAX_GROUP];
    for (int64_t g = 0; g < group; g++) {
        most[g] = -INFINITY, total[g] = 0;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) q[g][i] = scale * wide(query[g * size + i]), sums[g][i] = 0;
    }
    for (int64_t start = first; start <= last; start += NUM_KEYS) {
        int64_t num = last + 1 - start < NUM_KEYS ? last + 1 - start : NUM_KEYS;
        const bf16 *k = keys + start * size, *v = values + start * size;
        const bf16 *next = last - start < NUM_KEYS ? next_keys : k + NUM_KEYS * size;
        for (int64_t j = 0; j < num; j += 4) {
            prefetch(v + j * size, 4 * size);
            for (int64_t g = 0; g < group; g++) dots(p[g] + j, q[g], k + j * size, size, num - j, size);
        }
        for (int64_t g = 0; g < group; g++) {
            float now = most[g], sum = 0;
#pragma omp simd reduction(max : now)
            for (int64_t j = 0; j < num; j++) now = p[g][j] > now ? p[g][j] : now;
            float kept = exp_of(most[g] - now);
            most[g] = now;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < num; j++) p[g][j] = exp_of(p[g][j] - now), sum += p[g][j];
            total[g] = total[g] * kept + sum;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) sums[g][i] *= kept;
        }
        for (int64_t j = 0; j < num; j += 4) {
            prefetch(next + j * size, 4 * size);
            for (int64_t g = 0; g < group; g++) add_rows(sums[g], p[g] + j, v + j * size, size, num - j, size);
        }
    }
    for (int64_t g = 0; g < group; g++)
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[g * size + i] = narrow(sums[g][i] / total[g]);
}

/* Some tokens of a step, given by their numbers: their keys and values go into the cache [2, rows, key heads, capacity,
   size], then each attends to what its row holds up to its own position, or to the last `window` of that. Heads of a
   token lie side by side; from token to token it is `q_stride` in the queries, `kv_stride` in keys and values. */
void attend(bf16 *out, const bf16 *query, int64_t q_stride, const bf16 *key, const bf16 *value, int64_t kv_stride,
            bf16 *cache, int64_t num_rows, int64_t capacity, const int64_t *tokens, const int64_t *rows,
            const int64_t *positions, int64_t num, int64_t num_heads, int64_t num_kv, int64_t size, double scale,
            int64_t window) {
    int64_t group = num_heads / num_kv, head = capacity * size;
    bf16 *value_cache = cache + num_rows * num_kv * head;
#pragma omp parallel
    {
#pragma omp for
        for (int64_t t = 0; t < num; t++)
            for (int64_t h = 0; h < num_kv; h++) {
                int64_t from = tokens[t] * kv_stride + h * size;
                int64_t to = (rows[t] * num_kv + h) * head + positions[t] * size;
                memcpy(cache + to, key + from, size * sizeof(bf16));
                memcpy(value_cache + to, value + from, size * sizeof(bf16));
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < num; t++)
            for (int64_t h = 0; h < num_kv; h++) {
                const bf16 *q = query + tokens[t] * q_stride + h * group * size;
                const bf16 *k = cache + (rows[t] * num_kv + h) * head, *v = value_cache + (rows[t] * num_kv + h) * head;
                bf16 *o = out + (tokens[t] * num_heads + h * group) * size;
                int64_t last = positions[t], first = window && last >= window ? last - window + 1 : 0;
                if (size == 64) attend_group(o, q, k, v, k + head, first, last, scale, group, 64);
                else if (size == 128) attend_group(o, q, k, v, k + head, first, last, scale, group, 128);
                else attend_group(o, q, k, v, k + head, first, last, scale, group, size);
            }
    }
}

typedef struct {
    const bf16 *down;  /* [rank, in] */
    const bf16 *up;    /* [rank, out], the scale inside */
    const float *gain; /* [out] of DoRA, or null */
    int64_t rank;      /* 0: the adapter leaves this layer alone */
} Factors;

/* The second product of one adapter on `num` columns of one layer's output for one token, from column `first` on. */
INLINE void adapt_columns(bf16 *y, const float *low, const Factors *f, const bf16 *bias, int64_t first, int64_t num,
                          int64_t out) {
    float sums[NUM_COLUMNS];
#pragma omp simd
    for (int64_t i = 0; i < num; i++) sums[i] = wide(y[i]);
    for (int64_t r = 0; r < f->rank; r += 4) add_rows(sums, low + r, f->up + r * out + first, out, f->rank - r, num);
    for (int64_t i = 0; f->gain && i < num; i++) {
        float shift = bias ? wide(bias[i]) : 0;
        sums[i] = (sums[i] - shift) * f->gain[first + i] + shift;
    }
#pragma omp simd
    for (int64_t i = 0; i < num; i++) y[i] = narrow(sums[i]);
}

/* Adds to some tokens of y [tokens, out of all layers] what their adapters make of x [tokens, in]. The tokens listed
   from starts[s] to starts[s + 1] have the adapter whose factors, one for each layer, are at factors + s * stride. Layer
   l owns the columns from columns[l] to columns[l + 1]. `scratch` has room for [tokens, in + layers * max_rank]. */
void adapt(bf16 *y, const bf16 *x, const bf16 *bias, const int64_t *tokens, const int64_t *starts, int64_t num_adapters,
           const Factors *factors, int64_t stride, const int64_t *columns, int64_t num_layers, int64_t in,
           int64_t max_rank, float *scratch) {
    int64_t num_tokens = starts[num_adapters], out = columns[num_layers], low_size = num_layers * max_rank;
    float *low = scratch + num_tokens * in;
#pragma omp parallel
    {
#pragma omp for
        for (int64_t t = 0; t < num_tokens; t++)
#pragma omp simd
            for (int64_t i = 0; i < in; i++) scratch[t * in + i] = wide(x[tokens[t] * in + i]);
#pragma omp for collapse(3)
        for (int64_t s = 0; s < num_adapters; s++)
            for (int64_t l = 0; l < num_layers; l++)
                for (int64_t r = 0; r < max_rank; r += 4) {
                    const Factors *f = factors + s * stride + l, *next = l + 1 < num_layers ? f + 1 : f - l + stride;
                    if ((s + 1 < num_adapters || l + 1 < num_layers) && r < next->rank)
                        prefetch(next->down + r * in, 4 * in);
                    for (int64_t t = starts[s]; r < f->rank && t < starts[s + 1]; t++)
                        dots(low + t * low_size + l * max_rank + r, scratch + t * in, f->down + r * in, in, f->rank - r,
                             in);
                }
#pragma omp for collapse(2)
        for (int64_t s = 0; s < num_adapters; s++)
            for (int64_t start = 0; start < out; start += NUM_COLUMNS)
                for (int64_t l = 0; l < num_layers; l++) {
                    const Factors *f = factors + s * stride + l;
                    int64_t first = start > columns[l] ? start : columns[l];
                    int64_t end = start + NUM_COLUMNS < columns[l + 1] ? start + NUM_COLUMNS : columns[l + 1];
                    for (int64_t r = 0; s + 1 < num_adapters && first < end && r < f[stride].rank; r++)
                        prefetch(f[stride].up + r * (columns[l + 1] - columns[l]) + first - columns[l], end - first);
                    for (int64_t t = starts[s]; f->rank && first < end && t < starts[s + 1]; t++)
                        adapt_columns(y + tokens[t] * out + first, low + t * low_size + l * max_rank, f,
                                      bias ? bias + first : 0, first - columns[l], end - first,
                                      columns[l + 1] - columns[l]);
                }
    }
}
