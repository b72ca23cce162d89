/* Attention in bf16 on a CPU, over keys and values in the cache: of any tokens one by one, and of a piece of a prompt. */

#include "cpu_kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define NUM_KEYS 128 /* of a block: that many scores are kept at a time */
#define MAX_GROUP 32 /* query heads of a key head; the limits are checked by the caller */
#define MAX_SIZE 256 /* of a head */

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

void attend_tokens(const Heads *heads, bf16 *cache, int64_t num_rows, int64_t capacity, const int64_t *tokens,
                   const int64_t *rows, const int64_t *positions, int64_t num) {
    int64_t num_kv = heads->num_kv, size = heads->size, group = heads->num_heads / num_kv, head = capacity * size;
    bf16 *value_cache = cache + num_rows * num_kv * head;
#pragma omp for
    for (int64_t t = 0; t < num; t++)
        for (int64_t h = 0; h < num_kv; h++) {
            int64_t from = tokens[t] * heads->kv_stride + h * size;
            int64_t to = (rows[t] * num_kv + h) * head + positions[t] * size;
            memcpy(cache + to, heads->key + from, size * sizeof(bf16));
            memcpy(value_cache + to, heads->value + from, size * sizeof(bf16));
        }
#pragma omp for collapse(2) schedule(static)
    for (int64_t t = 0; t < num; t++)
        for (int64_t h = 0; h < num_kv; h++) {
            const bf16 *q = heads->query + tokens[t] * heads->q_stride + h * group * size;
            const bf16 *k = cache + (rows[t] * num_kv + h) * head, *v = value_cache + (rows[t] * num_kv + h) * head;
            bf16 *o = heads->out + (tokens[t] * heads->num_heads + h * group) * size;
            int64_t last = positions[t], window = heads->window;
            int64_t first = window && last >= window ? last - window + 1 : 0;
            if (size == 64) attend_group(o, q, k, v, k + head, first, last, heads->scale, group, 64);
            else if (size == 128) attend_group(o, q, k, v, k + head, first, last, heads->scale, group, 128);
            else attend_group(o, q, k, v, k + head, first, last, heads->scale, group, size);
        }
}

void attend(const Heads *heads, bf16 *cache, int64_t num_rows, int64_t capacity, const int64_t *tokens,
            const int64_t *rows, const int64_t *positions, int64_t num) {
#pragma omp parallel
    attend_tokens(heads, cache, num_rows, capacity, tokens, rows, positions, num);
}

#ifdef __AVX512BF16__
#define LANES 16
#define NUM_TOGETHER 64 /* keys of a block, and columns of a product: four vectors */
#define NUM_ROWS 6      /* of a product: with these, its sums fill the registers */
#define MAX_ROWS 192    /* queries of a key head that share the packing of a block of keys */

/* c [6, 64] = c * factors + A B of rows of pairs `a` and pairs `b` [pairs, 64]; c begins at 0 without factors. */
INLINE void product(float *c, int64_t c_stride, const float *factors, const bf16 *const *a, const uint32_t *b,
                    int64_t num_pairs) {
    __m512 sums[NUM_ROWS][4];
    for (int r = 0; r < NUM_ROWS; r++)
        for (int v = 0; v < 4; v++)
            sums[r][v] = factors ? _mm512_mul_ps(_mm512_loadu_ps(c + r * c_stride + v * LANES),
                                                 _mm512_set1_ps(factors[r]))
                                 : _mm512_setzero_ps();
    for (int64_t p = 0; p < num_pairs; p++) {
        __m512bh columns[4];
        for (int v = 0; v < 4; v++) columns[v] = (__m512bh)_mm512_loadu_si512(b + p * NUM_TOGETHER + v * LANES);
        for (int r = 0; r < NUM_ROWS; r++) {
            int32_t pair;
            memcpy(&pair, a[r] + 2 * p, sizeof pair);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < 4; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, columns[v]);
        }
    }
    for (int r = 0; r < NUM_ROWS; r++)
        for (int v = 0; v < 4; v++) _mm512_storeu_ps(c + r * c_stride + v * LANES, sums[r][v]);
}

/* Pairs along the head of 64 keys, of which `num` are there: [size / 2, 64]. */
INLINE void pack_keys(uint32_t *packed, const bf16 *keys, int64_t num, int64_t size) {
    for (int64_t i = 0; i < size / 2; i++, packed += NUM_TOGETHER) {
        for (int64_t j = 0; j < NUM_TOGETHER; j++)
            if (j < num) memcpy(packed + j, keys + j * size + 2 * i, sizeof *packed);
            else packed[j] = 0;
    }
}

/* Pairs of neighbouring values, of which `num` are there: [columns / 64, 32, 64]. */
INLINE void pack_values(uint32_t *packed, const bf16 *values, int64_t num, int64_t size) {
    for (int64_t c = 0; c < size; c += NUM_TOGETHER)
        for (int64_t j = 0; j < NUM_TOGETHER; j += 2, packed += NUM_TOGETHER)
            for (int64_t i = 0; i < NUM_TOGETHER; i++) {
                uint32_t low = j < num && c + i < size ? values[j * size + c + i] : 0;
                uint32_t high = j + 1 < num && c + i < size ? values[(j + 1) * size + c + i] : 0;
                packed[i] = low | high << 16;
            }
}

/* 2^x, by a polynomial fitted to x from -0.5 to 0.5; the relative error is below 3e-6. */
INLINE __m512 exp2_of(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(0.00956052f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05591712f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24024982f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69312196f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99999919f));
    return _mm512_scalef_ps(p, n);
}

/* 2^(scale * scores - maximum) of one query in bf16, for keys from `first` to `last` of the block; how much of the sums
   up to now is kept. */
INLINE float weigh(bf16 *weights, const float *scores, float *most, float *total, float scale, int64_t first,
                   int64_t last) {
    uint64_t seen = first >= NUM_TOGETHER || last < 0 ? 0 : ~0ull;
    if (seen && first > 0) seen &= ~0ull << first;
    if (seen && last < NUM_TOGETHER - 1) seen &= ~0ull >> (NUM_TOGETHER - 1 - last);
    __m512 x[4], highest = _mm512_set1_ps(*most), sum = _mm512_setzero_ps();
    for (int v = 0; v < 4; v++) {
        x[v] = _mm512_mul_ps(_mm512_loadu_ps(scores + v * LANES), _mm512_set1_ps(scale));
        highest = _mm512_mask_max_ps(highest, seen >> v * LANES, highest, x[v]);
    }
    float now = _mm512_reduce_max_ps(highest), kept = now == *most ? 1 : exp2f(*most - now);
    for (int v = 0; v < 4; v++) {
        x[v] = _mm512_maskz_mov_ps(seen >> v * LANES, exp2_of(_mm512_sub_ps(x[v], _mm512_set1_ps(now))));
        sum = _mm512_add_ps(sum, x[v]);
        _mm256_storeu_si256((__m256i *)(weights + v * LANES), (__m256i)_mm512_cvtneps_pbh(x[v]));
    }
    *most = now, *total = *total * kept + _mm512_reduce_add_ps(sum);
    return kept;
}

typedef struct {
    const bf16 *query;
    int64_t last; /* of the keys that it sees */
    float most, total;
} Query;

/* Some queries of one key head over all of their keys, block by block. */
static void attend_rows(Query *queries, float *sums, int64_t columns, int64_t num, const bf16 *keys,
                        const bf16 *values, int64_t first, int64_t last, float scale, int64_t size, int64_t window) {
    uint32_t packed_keys[MAX_SIZE / 2 * NUM_TOGETHER], packed_values[MAX_SIZE / 2 * NUM_TOGETHER];
    float scores[NUM_ROWS][NUM_TOGETHER], kept[NUM_ROWS];
    bf16 weights[NUM_ROWS][NUM_TOGETHER];
    const bf16 *rows[NUM_ROWS], *weight_rows[NUM_ROWS];
    for (int r = 0; r < NUM_ROWS; r++) weight_rows[r] = weights[r];
    for (int64_t start = first; start <= last; start += NUM_TOGETHER) {
        pack_keys(packed_keys, keys + start * size, last + 1 - start, size);
        pack_values(packed_values, values + start * size, last + 1 - start, size);
        for (Query *q = queries; q < queries + num; q += NUM_ROWS) {
            int64_t seen = q->last, begun = q->last;
            for (int r = 0; r < NUM_ROWS; r++) {
                rows[r] = q[r].query;
                seen = q[r].last > seen ? q[r].last : seen, begun = q[r].last < begun ? q[r].last : begun;
            }
            if (start > seen || (window && start + NUM_TOGETHER <= begun + 1 - window)) continue;
            product(scores[0], NUM_TOGETHER, 0, rows, packed_keys, size / 2);
            for (int r = 0; r < NUM_ROWS; r++)
                kept[r] = weigh(weights[r], scores[r], &q[r].most, &q[r].total, scale,
                                window ? q[r].last + 1 - window - start : 0, q[r].last - start);
            for (int64_t c = 0; c < size; c += NUM_TOGETHER)
                product(sums + (q - queries) * columns + c, columns, kept, weight_rows,
                        packed_values + c * NUM_TOGETHER / 2, NUM_TOGETHER / 2);
        }
    }
}

/* The queries of some tokens of a piece, from `from` to `end`, of one key head `h`. */
static void attend_part(const Heads *heads, const bf16 *keys, const bf16 *values, int64_t first, int64_t start,
                        int64_t from, int64_t end, int64_t h) {
    Query queries[MAX_ROWS];
    float sums[MAX_ROWS * MAX_SIZE];
    int64_t size = heads->size, group = heads->num_heads / heads->num_kv, window = heads->window, num = 0;
    int64_t columns = (size + NUM_TOGETHER - 1) / NUM_TOGETHER * NUM_TOGETHER;
    for (int64_t g = 0; g < group; g++)
        for (int64_t t = from; t < end; t++) {
            const bf16 *query = heads->query + (first + t) * heads->q_stride + (h * group + g) * size;
            queries[num++] = (Query){query, start + t, -1e30f, 0};
        }
    int64_t rows = (num + NUM_ROWS - 1) / NUM_ROWS * NUM_ROWS;
    for (int64_t r = num; r < rows; r++) queries[r] = queries[num - 1];
    memset(sums, 0, rows * columns * sizeof *sums);
    int64_t begin = window && start + from >= window ? start + from - window + 1 : 0;
    attend_rows(queries, sums, columns, rows, keys, values, begin, start + end - 1, heads->scale * 1.44269504, size,
                window);
    for (int64_t r = 0; r < num; r++) {
        int64_t t = first + from + r % (end - from), g = r / (end - from);
        bf16 *o = heads->out + (t * heads->num_heads + h * group + g) * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) o[i] = narrow(sums[r * columns + i] / queries[r].total);
    }
}

void attend_prompt(const Heads *heads, bf16 *keys, bf16 *values, int64_t capacity, int64_t first, int64_t start,
                   int64_t num) {
    int64_t size = heads->size, head = capacity * size, step = MAX_ROWS * heads->num_kv / heads->num_heads;
    step = (num + 1) / 2 < step ? (num + 1) / 2 : step; /* so that short pieces, too, occupy several threads */
#pragma omp for collapse(2)
    for (int64_t t = 0; t < num; t++)
        for (int64_t h = 0; h < heads->num_kv; h++) {
            int64_t from = (first + t) * heads->kv_stride + h * size, to = h * head + (start + t) * size;
            memcpy(keys + to, heads->key + from, size * sizeof(bf16));
            memcpy(values + to, heads->value + from, size * sizeof(bf16));
        }
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = 0; h < heads->num_kv; h++)
        for (int64_t from = 0; from < num; from += step) {
            int64_t end = from + step < num ? from + step : num;
            attend_part(heads, keys + h * head, values + h * head, first, start, from, end, h);
        }
}

void attend_piece(const Heads *heads, bf16 *keys, bf16 *values, int64_t capacity, int64_t first, int64_t start,
                  int64_t num) {
#pragma omp parallel
    attend_prompt(heads, keys, values, capacity, first, start, num);
}
#endif
