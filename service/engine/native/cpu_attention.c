/* Attention in bf16 on a CPU, over keys and values in the cache: of any tokens by themselves, and of a piece of a
   prompt. */

#include "cpu_kernels.h"

#define NUM_KEYS 128 /* of a block: that many scores are kept at a time */
#define MAX_GROUP 32 /* query heads of a key head; the limits are checked by the caller */
#define MAX_SIZE 256 /* of a head */

/* The query heads of one key head, in blocks of keys with a running maximum (Milakov & Gimelshein 2018); `next_keys`
   are read after these. */
INLINE void attend_group(bf16 *out, const bf16 *query, const bf16 *keys, const bf16 *values, const bf16 *next_keys,
                         int64_t first, int64_t last, float scale, int64_t group, int64_t size) {
    float sums[MAX_GROUP][MAX_SIZE], p[MAX_GROUP][NUM_KEYS], most[MAX_GROUP], total[MAX_GROUP];
    for (int64_t g = 0; g < group; g++) {
        most[g] = -INFINITY, total[g] = 0;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) sums[g][i] = 0;
    }
    for (int64_t start = first; start <= last; start += NUM_KEYS) {
        int64_t num = last + 1 - start < NUM_KEYS ? last + 1 - start : NUM_KEYS;
        const bf16 *k = keys + start * size, *v = values + start * size;
        const bf16 *next = last - start < NUM_KEYS ? next_keys : k + NUM_KEYS * size;
        for (int64_t j = 0; j < num; j += 4) {
            prefetch(v + j * size, 4 * size);
            for (int64_t g = 0; g < group; g++) dots(p[g] + j, query + g * size, k + j * size, num - j, size);
        }
        for (int64_t g = 0; g < group; g++) {
            float now = most[g], sum = 0;
#pragma omp simd reduction(max : now)
            for (int64_t j = 0; j < num; j++) p[g][j] *= scale, now = p[g][j] > now ? p[g][j] : now;
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
#define NUM_ROWS 16     /* of a product, by tiles */
#define NUM_FEW_ROWS 6  /* and by vectors: with these, its sums fill the registers */
#define MAX_ROWS 192    /* queries of a key head that share the packing of a block of keys; a multiple of both */

/* c [rows, 64] = c * factors + A B of rows `a` and pairs `b` [pairs, 64]; c begins at 0 without factors. */
INLINE void product_of_vectors(float *c, int64_t c_stride, const float *factors, const bf16 *a, int64_t a_stride,
                               const uint32_t *b, int64_t num_pairs) {
    __m512 sums[NUM_FEW_ROWS][4];
    for (int r = 0; r < NUM_FEW_ROWS; r++)
        for (int v = 0; v < 4; v++)
            sums[r][v] = factors ? _mm512_mul_ps(_mm512_loadu_ps(c + r * c_stride + v * LANES),
                                                 _mm512_set1_ps(factors[r]))
                                 : _mm512_setzero_ps();
    for (int64_t p = 0; p < num_pairs; p++) {
        __m512bh columns[4];
        for (int v = 0; v < 4; v++) columns[v] = (__m512bh)_mm512_loadu_si512(b + p * NUM_TOGETHER + v * LANES);
        for (int r = 0; r < NUM_FEW_ROWS; r++) {
            int32_t pair;
            memcpy(&pair, a + r * a_stride + 2 * p, sizeof pair);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < 4; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, columns[v]);
        }
    }
    for (int r = 0; r < NUM_FEW_ROWS; r++)
        for (int v = 0; v < 4; v++) _mm512_storeu_ps(c + r * c_stride + v * LANES, sums[r][v]);
}

/* The same with more rows; pairs in multiples of 16. */
#ifdef __AMX_BF16__
INLINE void product_of_tiles(float *c, int64_t c_stride, const float *factors, const bf16 *a, int64_t a_stride,
                             const uint32_t *b, int64_t num_pairs) {
    int64_t c_bytes = c_stride * sizeof *c, a_bytes = a_stride * sizeof *a, b_bytes = NUM_TOGETHER * sizeof *b;
    for (int r = 0; factors && r < NUM_ROWS; r++)
        for (int v = 0; v < 4; v++) {
            float *at = c + r * c_stride + v * LANES;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(factors[r])));
        }
    BEFORE_TILES();
    if (factors) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + LANES, c_bytes);
        _tile_loadd(2, c + 2 * LANES, c_bytes);
        _tile_loadd(3, c + 3 * LANES, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t p = 0; p < num_pairs; p += 16) {
        const uint32_t *columns = b + p * NUM_TOGETHER;
        _tile_loadd(4, a + 2 * p, a_bytes);
        _tile_loadd(5, columns, b_bytes);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, columns + LANES, b_bytes);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, columns + 2 * LANES, b_bytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, columns + 3 * LANES, b_bytes);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + LANES, c_bytes);
    _tile_stored(2, c + 2 * LANES, c_bytes);
    _tile_stored(3, c + 3 * LANES, c_bytes);
}
#else
#define product_of_tiles product_of_vectors
#endif

/* Pairs along the head of 64 keys, of which `num` are there: [padded / 2, 64]. */
INLINE void pack_keys(uint32_t *packed, const bf16 *keys, int64_t num, int64_t size, int64_t padded) {
    for (int64_t i = 0; i < padded / 2; i++, packed += NUM_TOGETHER) {
        for (int64_t j = 0; j < NUM_TOGETHER; j++)
            if (j < num && 2 * i < size) memcpy(packed + j, keys + j * size + 2 * i, sizeof *packed);
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
    int64_t last; /* of the keys that it sees */
    float most, total;
} Query;

/* Some queries of one key head, `rows` [num, padded size], over all of their keys, block by block. */
static void attend_rows(Query *queries, const bf16 *rows, float *sums, int64_t columns, int64_t num, int64_t together,
                        const bf16 *keys, const bf16 *values, int64_t first, int64_t last, float scale, int64_t size,
                        int64_t padded, int64_t window) {
    uint32_t packed_keys[MAX_SIZE / 2 * NUM_TOGETHER], packed_values[MAX_SIZE / 2 * NUM_TOGETHER];
    float scores[NUM_ROWS][NUM_TOGETHER], kept[NUM_ROWS];
    bf16 weights[NUM_ROWS][NUM_TOGETHER];
    for (int64_t start = first; start <= last; start += NUM_TOGETHER) {
        pack_keys(packed_keys, keys + start * size, last + 1 - start, size, padded);
        pack_values(packed_values, values + start * size, last + 1 - start, size);
        for (int64_t from = 0; from < num; from += together) {
            Query *q = queries + from;
            int64_t seen = q->last, begun = q->last;
            for (int r = 0; r < together; r++)
                seen = q[r].last > seen ? q[r].last : seen, begun = q[r].last < begun ? q[r].last : begun;
            if (start > seen || (window && start + NUM_TOGETHER <= begun + 1 - window)) continue;
            if (together == NUM_ROWS)
                product_of_tiles(scores[0], NUM_TOGETHER, 0, rows + from * padded, padded, packed_keys, padded / 2);
            else
                product_of_vectors(scores[0], NUM_TOGETHER, 0, rows + from * padded, padded, packed_keys, padded / 2);
            for (int r = 0; r < together; r++)
                kept[r] = weigh(weights[r], scores[r], &q[r].most, &q[r].total, scale,
                                window ? q[r].last + 1 - window - start : 0, q[r].last - start);
            for (int64_t c = 0; c < size; c += NUM_TOGETHER) {
                float *at = sums + from * columns + c;
                const uint32_t *block = packed_values + c * NUM_TOGETHER / 2;
                if (together == NUM_ROWS)
                    product_of_tiles(at, columns, kept, weights[0], NUM_TOGETHER, block, NUM_TOGETHER / 2);
                else
                    product_of_vectors(at, columns, kept, weights[0], NUM_TOGETHER, block, NUM_TOGETHER / 2);
            }
        }
    }
}

/* The queries of some tokens of a piece, from `from` to `end`, of one key head `h`. */
static void attend_part(const Heads *heads, const bf16 *keys, const bf16 *values, int64_t first, int64_t start,
                        int64_t from, int64_t end, int64_t h) {
    Query queries[MAX_ROWS];
    bf16 rows[MAX_ROWS * MAX_SIZE];
    float sums[MAX_ROWS * MAX_SIZE];
    int64_t size = heads->size, group = heads->num_heads / heads->num_kv, window = heads->window, num = 0;
    int64_t columns = (size + NUM_TOGETHER - 1) / NUM_TOGETHER * NUM_TOGETHER, padded = (size + 31) / 32 * 32;
    int64_t together = may_use_tiles() ? NUM_ROWS : NUM_FEW_ROWS, count = group * (end - from);
    int64_t num_rows = (count + together - 1) / together * together;
    memset(sums, 0, num_rows * columns * sizeof *sums);
    memset(rows, 0, num_rows * padded * sizeof *rows);
    for (int64_t g = 0; g < group; g++)
        for (int64_t t = from; t < end; t++, num++) {
            queries[num] = (Query){start + t, -1e30f, 0};
            const bf16 *query = heads->query + (first + t) * heads->q_stride + (h * group + g) * size;
            memcpy(rows + num * padded, query, size * sizeof *rows);
        }
    for (; num < num_rows; num++) queries[num] = queries[num - 1]; /* that nobody looks at */
    int64_t begin = window && start + from >= window ? start + from - window + 1 : 0;
    shape_tiles(2 * NUM_ROWS);
    attend_rows(queries, rows, sums, columns, num_rows, together, keys, values, begin, start + end - 1,
                heads->scale * 1.44269504, size, padded, window);
    release_tiles();
    for (int64_t r = 0; r < count; r++) {
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
