/* Attention in bf16 on a CPU, over keys and values in the cache, of a piece of a prompt. Its tokens are taken together,
   as products of many queries with blocks of keys, of the processor's tiles (AMX) or vectors (AVX-512). */

#include "cpu_kernels.h"

#ifdef __AVX512BF16__
#define NUM_KEYS 128 /* of a block: that many share a maximum */
#define LANES 16
#define NUM_TOGETHER 64 /* columns of a product: four vectors */
#define NUM_HALVES (NUM_KEYS / NUM_TOGETHER)
#define NUM_ROWS 16      /* of a product, by tiles */
#define NUM_FEW_ROWS 6   /* and by vectors: with these, its sums fill the registers */
#define MAX_ROWS 384     /* queries of a key head that share the packing of a block; a multiple of both; 0.8 MB */
#define MOST_GROWTH 8.0f /* of weights, as a power of 2, before sums are scaled anew */

/* c [rows, 64], from 0 on or added to, of rows `a` and pairs `b` [pairs, 64]. */
INLINE void product_of_vectors(float *c, int64_t c_stride, int is_added, const bf16 *a, int64_t a_stride,
                               const uint32_t *b, int64_t num_pairs) {
    __m512 sums[NUM_FEW_ROWS][4];
    for (int r = 0; r < NUM_FEW_ROWS; r++)
        for (int v = 0; v < 4; v++)
            sums[r][v] = is_added ? _mm512_loadu_ps(c + r * c_stride + v * LANES) : _mm512_setzero_ps();
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
INLINE void product_of_tiles(float *c, int64_t c_stride, int is_added, const bf16 *a, int64_t a_stride,
                             const uint32_t *b, int64_t num_pairs) {
    int64_t c_bytes = c_stride * sizeof *c, a_bytes = a_stride * sizeof *a, b_bytes = NUM_TOGETHER * sizeof *b;
    BEFORE_TILES();
    if (is_added) {
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

/* out[i][j] = x[j][i] of 16 x 16 pairs of bf16, by halves of vectors, then their quarters; x is used up. */
INLINE void transpose(__m512i out[LANES], __m512i x[LANES]) {
    __m512i y[LANES];
    for (int i = 0; i < LANES; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < LANES; i += 8)
        for (int j = 0; j < 4; j++) {
            y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
            y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
        }
    for (int i = 0; i < LANES / 2; i++) {
        out[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        out[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

INLINE uint32_t first_bits(int64_t num) { return num >= 32 ? ~0u : num > 0 ? (1u << num) - 1 : 0; }

/* Pairs along the head of 64 keys, of which `num` are there: [padded / 2, 64]. */
INLINE void pack_keys(uint32_t *packed, const bf16 *keys, int64_t num, int64_t size, int64_t padded) {
    for (int64_t i = 0; i < padded / 2; i += LANES)
        for (int64_t j = 0; j < NUM_TOGETHER; j += LANES) {
            __m512i rows[LANES], columns[LANES];
            for (int64_t r = 0; r < LANES; r++)
                rows[r] = _mm512_maskz_loadu_epi32(j + r < num ? first_bits(size / 2 - i) : 0,
                                                   keys + (j + r) * size + 2 * i);
            transpose(columns, rows);
            for (int64_t c = 0; c < LANES; c++) _mm512_storeu_si512(packed + (i + c) * NUM_TOGETHER + j, columns[c]);
        }
}

/* Pairs of neighbouring values of 128 keys, of which `num` are there: [columns / 64, 64, 64]. */
INLINE void pack_values(uint32_t *packed, const bf16 *values, int64_t num, int64_t size) {
    for (int64_t c = 0; c < size; c += NUM_TOGETHER)
        for (int64_t j = 0; j < NUM_KEYS; j += 2, packed += NUM_TOGETHER)
            for (int64_t v = 0; v < NUM_TOGETHER; v += LANES) {
                const bf16 *at = values + j * size + c + v;
                uint32_t seen = first_bits(size - c - v);
                __m256i first = _mm256_maskz_loadu_epi16(j < num ? seen : 0, at);
                __m256i second = _mm256_maskz_loadu_epi16(j + 1 < num ? seen : 0, at + size);
                __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
                _mm512_storeu_si512(packed + v, _mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
            }
}

/* 2^x, by a polynomial fitted to x from -0.5 to 0.5, of the lanes in `seen`, else 0; the relative error is below
   3e-6. */
INLINE __m512 exp2_of(__m512 x, __mmask16 seen) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n = _mm512_sub_ps(x, r);
    __m512 p = _mm512_set1_ps(0.00956052f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05591712f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24024982f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69312196f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99999919f));
    return _mm512_maskz_scalef_ps(seen, p, n);
}

/* A query and what it has seen of its keys. */
typedef struct {
    int64_t last; /* of the keys that it sees */
    float most;   /* as a power of 2, what weights are divided by */
    __m512 total; /* of the weights, over the lanes */
} Query;

/* Queries of one key head. */
typedef struct {
    Query queries[MAX_ROWS];
    bf16 rows[MAX_ROWS * MAX_SIZE];        /* [num, padded size] */
    float sums[MAX_ROWS * MAX_SIZE];       /* [num, columns]: of values by weights */
    int64_t num, together;                 /* a multiple of those that are multiplied together */
    int64_t size, padded, columns, window; /* the second and third are the size in multiples of 32 and 64 */
    float scale;                           /* of scores as powers of 2 */
} Queries;

/* Pairs of a block of keys and values. */
typedef struct {
    uint32_t keys[MAX_SIZE / 2 * NUM_KEYS], values[MAX_SIZE / 2 * NUM_KEYS];
    int64_t start; /* number of the first */
} Block;

/* 2^(scale * scores) of one query in bf16, divided, for keys from `first` to `last` of the first `num_vectors` of the
   block; how much of the sums up to now is kept. What weights are divided by stays as long as they do not grow too
   large (the rule of FlashAttention-4), so that hardly any block scales the sums. */
INLINE float weigh(bf16 *weights, const float *scores, Query *q, float scale, int64_t first, int64_t last,
                   int num_vectors) {
    __m512 x[NUM_KEYS / LANES], highest = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scale);
    __mmask16 seen[NUM_KEYS / LANES];
    float kept = 1;
    for (int v = 0; v < num_vectors; v++) {
        seen[v] = first_bits(last + 1 - v * LANES) & ~first_bits(first - v * LANES);
        x[v] = _mm512_fmsub_ps(_mm512_loadu_ps(scores + v * LANES), factor, _mm512_set1_ps(q->most));
        highest = _mm512_mask_max_ps(highest, seen[v], highest, x[v]);
    }
    if (_mm512_cmp_ps_mask(highest, _mm512_set1_ps(MOST_GROWTH), _CMP_GT_OQ)) {
        highest = _mm512_set1_ps(-INFINITY);
        for (int v = 0; v < num_vectors; v++) {
            x[v] = _mm512_mul_ps(_mm512_loadu_ps(scores + v * LANES), factor);
            highest = _mm512_mask_max_ps(highest, seen[v], highest, x[v]);
        }
        float now = _mm512_reduce_max_ps(highest);
        for (int v = 0; v < num_vectors; v++) x[v] = _mm512_sub_ps(x[v], _mm512_set1_ps(now));
        kept = exp2f(q->most - now);
        q->most = now;
        q->total = _mm512_mul_ps(q->total, _mm512_set1_ps(kept));
    }
    for (int v = 0; v < num_vectors; v++) {
        x[v] = exp2_of(x[v], seen[v]);
        q->total = _mm512_add_ps(q->total, x[v]);
        _mm256_storeu_si256((__m256i *)(weights + v * LANES), (__m256i)_mm512_cvtneps_pbh(x[v]));
    }
    return kept;
}

INLINE void product(float *c, int64_t c_stride, int is_added, const bf16 *a, int64_t a_stride, const uint32_t *b,
                    int64_t num_pairs, int64_t together) {
    if (together == NUM_ROWS) product_of_tiles(c, c_stride, is_added, a, a_stride, b, num_pairs);
    else product_of_vectors(c, c_stride, is_added, a, a_stride, b, num_pairs);
}

/* Adds to some queries together, from `from` on, what they see in the first halves of a block. */
INLINE void attend_block(Queries *all, int64_t from, const Block *block, int num_halves) {
    float scores[NUM_ROWS][NUM_KEYS], *sums = all->sums + from * all->columns;
    bf16 weights[NUM_ROWS][NUM_KEYS];
    int64_t num_pairs = all->padded / 2;
    for (int h = 0; h < num_halves; h++)
        product(scores[0] + h * NUM_TOGETHER, NUM_KEYS, 0, all->rows + from * all->padded, all->padded,
                block->keys + h * num_pairs * NUM_TOGETHER, num_pairs, all->together);
    for (int64_t r = 0; r < all->together; r++) {
        Query *q = all->queries + from + r;
        int64_t last = q->last - block->start, first = all->window ? last + 1 - all->window : 0;
        float kept = weigh(weights[r], scores[r], q, all->scale, first, last, num_halves * NUM_TOGETHER / LANES);
        if (kept != 1)
            for (int64_t i = 0; i < all->columns; i++) sums[r * all->columns + i] *= kept;
    }
    for (int64_t c = 0; c < all->columns; c += NUM_TOGETHER)
        product(sums + c, all->columns, 1, weights[0], NUM_KEYS, block->values + c * NUM_KEYS / 2,
                num_halves * NUM_TOGETHER / 2, all->together);
}

/* All queries over all of their keys, from `first` to `last`, block by block. */
static void attend_keys(Queries *all, const bf16 *keys, const bf16 *values, int64_t first, int64_t last) {
    Block block;
    for (int64_t start = block.start = first; start <= last; start = block.start += NUM_KEYS) {
        int64_t left = last + 1 - start;
        for (int64_t j = 0; j < NUM_KEYS && j < left; j += NUM_TOGETHER)
            pack_keys(block.keys + j * all->padded / 2, keys + (start + j) * all->size, left - j, all->size,
                      all->padded);
        pack_values(block.values, values + start * all->size, left, all->size);
        for (int64_t from = 0; from < all->num; from += all->together) {
            Query *q = all->queries + from;
            int64_t seen = q->last, begun = q->last;
            for (int r = 0; r < all->together; r++)
                seen = q[r].last > seen ? q[r].last : seen, begun = q[r].last < begun ? q[r].last : begun;
            if (start > seen || (all->window && start + NUM_KEYS <= begun + 1 - all->window)) continue;
            if (seen - start < NUM_TOGETHER) attend_block(all, from, &block, 1);
            else attend_block(all, from, &block, NUM_HALVES);
        }
    }
}

/* The queries of some tokens of a piece, from `from` to `end`, of one key head `h`. */
static void attend_part(const Heads *heads, const bf16 *keys, const bf16 *values, int64_t first, int64_t start,
                        int64_t from, int64_t end, int64_t h) {
    Queries all;
    int64_t size = heads->size, group = heads->num_heads / heads->num_kv, count = group * (end - from), num = 0;
    all.size = size, all.window = heads->window, all.scale = heads->scale * 1.44269504;
    all.columns = (size + NUM_TOGETHER - 1) / NUM_TOGETHER * NUM_TOGETHER, all.padded = (size + 31) / 32 * 32;
    all.together = may_use_tiles() ? NUM_ROWS : NUM_FEW_ROWS;
    all.num = (count + all.together - 1) / all.together * all.together;
    memset(all.sums, 0, all.num * all.columns * sizeof *all.sums);
    memset(all.rows, 0, all.num * all.padded * sizeof *all.rows);
    for (int64_t g = 0; g < group; g++)
        for (int64_t t = from; t < end; t++, num++) {
            all.queries[num] = (Query){start + t, -1e30f, _mm512_setzero_ps()};
            const bf16 *query = heads->query + (first + t) * heads->q_stride + (h * group + g) * size;
            memcpy(all.rows + num * all.padded, query, size * sizeof *query);
        }
    for (; num < all.num; num++) all.queries[num] = all.queries[num - 1]; /* that nobody looks at */
    int64_t begin = all.window && start + from >= all.window ? start + from - all.window + 1 : 0;
    shape_tiles(2 * NUM_ROWS);
    attend_keys(&all, keys, values, begin, start + end - 1);
    release_tiles();
    for (int64_t r = 0; r < count; r++) {
        int64_t t = first + from + r % (end - from), g = r / (end - from);
        bf16 *o = heads->out + (t * heads->num_heads + h * group + g) * size;
        float total = _mm512_reduce_add_ps(all.queries[r].total);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) o[i] = narrow(all.sums[r * all.columns + i] / total);
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
