/* Attention in bf16 on a CPU, over keys and values in the cache, of a piece of a prompt. Its tokens are taken together,
   as products of blocks of keys with many queries, of the processor's tiles (AMX) or vectors (AVX-512). Queries lie
   along the lanes: keys are then multiplied as they lie in the cache, and what is done to each query needs no sum over
   the lanes of a vector. */

#include "cpu_kernels.h"

#ifdef __AVX512BF16__
#define NUM_KEYS 128 /* of a block: that many share a maximum */
#define LANES 16
#define NUM_TOGETHER 32  /* queries of a product: two vectors or tiles; they are a group */
#define NUM_ROWS 8       /* of a product, by vectors */
#define MOST_TOGETHER 12 /* groups of a key head that share the packing of a block; 0.6 MB */
#define MOST_GROWTH 8.0f /* of weights, as a power of 2, before sums are scaled anew */

/* c [num_rows, 32], from 0 on or added to, of rows `a` and pairs `b` [pairs, 32]; rows and pairs in multiples of 16. */
static void product_of_vectors(float *c, int is_added, const bf16 *a, int64_t a_stride, const uint32_t *b,
                               int64_t num_pairs, int64_t num_rows) {
    for (; num_rows > 0; num_rows -= NUM_ROWS, c += NUM_ROWS * NUM_TOGETHER, a += NUM_ROWS * a_stride) {
        __m512 sums[NUM_ROWS][2];
        for (int r = 0; r < NUM_ROWS; r++)
            for (int v = 0; v < 2; v++)
                sums[r][v] = is_added ? _mm512_loadu_ps(c + r * NUM_TOGETHER + v * LANES) : _mm512_setzero_ps();
        for (int64_t p = 0; p < num_pairs; p++) {
            __m512bh low = (__m512bh)_mm512_loadu_si512(b + p * NUM_TOGETHER);
            __m512bh high = (__m512bh)_mm512_loadu_si512(b + p * NUM_TOGETHER + LANES);
            for (int r = 0; r < NUM_ROWS; r++) {
                int32_t pair;
                memcpy(&pair, a + r * a_stride + 2 * p, sizeof pair);
                __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, low);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, high);
            }
        }
        for (int r = 0; r < NUM_ROWS; r++)
            for (int v = 0; v < 2; v++) _mm512_storeu_ps(c + r * NUM_TOGETHER + v * LANES, sums[r][v]);
    }
}

#ifdef __AMX_BF16__
/* The same. Loading tiles is what takes time, so those of `b` stay while all rows pass by. */
static void product_of_tiles(float *c, int is_added, const bf16 *a, int64_t a_stride, const uint32_t *b,
                             int64_t num_pairs, int64_t num_rows) {
    int64_t a_bytes = a_stride * sizeof *a, row_bytes = NUM_TOGETHER * sizeof *b;
    BEFORE_TILES();
    for (int64_t p = 0; p < num_pairs; p += 2 * LANES, a += 4 * LANES, b += 2 * LANES * NUM_TOGETHER, is_added = 1) {
        int has_two = p + LANES < num_pairs;
        _tile_loadd(4, b, row_bytes);
        _tile_loadd(5, b + LANES, row_bytes);
        if (has_two) {
            _tile_loadd(6, b + LANES * NUM_TOGETHER, row_bytes);
            _tile_loadd(7, b + LANES * NUM_TOGETHER + LANES, row_bytes);
        }
        for (int64_t r = 0; r < num_rows; r += LANES) {
            float *sums = c + r * NUM_TOGETHER;
            if (is_added) {
                _tile_loadd(0, sums, row_bytes);
                _tile_loadd(1, sums + LANES, row_bytes);
            } else {
                _tile_zero(0);
                _tile_zero(1);
            }
            _tile_loadd(2, a + r * a_stride, a_bytes);
            _tile_dpbf16ps(0, 2, 4);
            _tile_dpbf16ps(1, 2, 5);
            if (has_two) {
                _tile_loadd(3, a + r * a_stride + 2 * LANES, a_bytes);
                _tile_dpbf16ps(0, 3, 6);
                _tile_dpbf16ps(1, 3, 7);
            }
            _tile_stored(0, sums, row_bytes);
            _tile_stored(1, sums + LANES, row_bytes);
        }
    }
}
#else
#define product_of_tiles product_of_vectors
#endif

/* out[i][j] = x[j][i] of 16 x 16 pairs of bf16, or floats, by halves of vectors, then their quarters; x is used up. */
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

/* 2^x, by a polynomial fitted to x from -0.5 to 0.5; the relative error is below 1e-4, a tenth of a bf16's. */
INLINE __m512 exp2_of(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n = _mm512_sub_ps(x, r);
    __m512 p = _mm512_set1_ps(0.05517167f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24261113f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69326099f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99992807f));
    return _mm512_scalef_ps(p, n);
}

/* 32 queries of one key head, and what they have seen of its keys. */
typedef struct {
    uint32_t pairs[MAX_SIZE / 2 * NUM_TOGETHER]; /* along the head */
    float sums[MAX_SIZE * NUM_TOGETHER];         /* [columns, 32]: of values by weights */
    __m512 most[2], total[2];                    /* as a power of 2, what weights are divided by; their sum */
    int32_t last[NUM_TOGETHER];                  /* of the keys that each sees */
} Group;

typedef struct {
    Group groups[MOST_TOGETHER];
    int64_t num_groups, size, padded, columns, window; /* padded and columns are the size in multiples of 32 and 16 */
    float scale;                                       /* of scores as powers of 2 */
} Queries;

typedef struct {
    const bf16 *keys; /* [keys, padded size]: those in the cache, or these */
    bf16 copies[NUM_KEYS * MAX_SIZE];
    bf16 values[MAX_SIZE * NUM_KEYS]; /* [columns, keys] */
    int64_t start;                    /* number of the first */
} Block;

/* Pairs along the heads of 16 queries: [padded size / 2, 16 of 32]. */
INLINE void pack_queries(uint32_t *pairs, const bf16 *const *queries, int64_t size) {
    for (int64_t i = 0; i < size / 2; i += LANES) {
        __m512i rows[LANES], columns[LANES];
        for (int64_t r = 0; r < LANES; r++)
            rows[r] = _mm512_maskz_loadu_epi32(first_bits(size / 2 - i), queries[r] + 2 * i);
        transpose(columns, rows);
        for (int64_t c = 0; c < LANES; c++) _mm512_storeu_si512(pairs + (i + c) * NUM_TOGETHER, columns[c]);
    }
}

/* [columns, keys] of a block's values, of which `num` are there, and zeros behind them. */
INLINE void pack_values(bf16 *packed, const bf16 *values, int64_t num, int64_t size) {
    for (int64_t c = 0; c < size; c += LANES)
        for (int64_t j = 0; j < NUM_KEYS; j += 2 * LANES) {
            __m512i rows[LANES], columns[LANES];
            __mmask16 seen = first_bits(size - c);
            for (int64_t r = 0; r < LANES; r++) {
                const bf16 *at = values + (j + 2 * r) * size + c;
                __m256i first = _mm256_maskz_loadu_epi16(j + 2 * r < num ? seen : 0, at);
                __m256i second = _mm256_maskz_loadu_epi16(j + 2 * r + 1 < num ? seen : 0, at + size);
                __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
                rows[r] = _mm512_or_si512(_mm512_cvtepu16_epi32(first), high);
            }
            transpose(columns, rows);
            for (int64_t i = 0; i < LANES; i++) _mm512_storeu_si512(packed + (c + i) * NUM_KEYS + j, columns[i]);
        }
}

/* A block, of which `num` keys and values are there. */
static void pack_block(Block *block, const bf16 *keys, const bf16 *values, int64_t num, int64_t size, int64_t padded) {
    if (num >= NUM_KEYS) pack_values(block->values, values, NUM_KEYS, size); /* a constant: nothing to compare */
    else pack_values(block->values, values, num, size);
    block->keys = keys;
    if (num >= NUM_KEYS && size == padded) return;
    block->keys = block->copies;
    for (int64_t j = 0; j < NUM_KEYS; j++)
        for (int64_t i = 0; i < padded; i += 2 * LANES)
            _mm512_storeu_si512(block->copies + j * padded + i,
                                _mm512_maskz_loadu_epi16(j < num ? first_bits(size - i) : 0, keys + j * size + i));
}

/* Pairs of bf16, to nearest, of positive numbers. */
INLINE __m512i pairs_of(__m512 first, __m512 second) {
    __m512i half = _mm512_set1_epi32(0x8000), low = _mm512_add_epi32((__m512i)first, half);
    __m512i high = _mm512_add_epi32((__m512i)second, half);
    return _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, _mm512_set1_epi32(0xffff0000)));
}

/* Which of 16 queries see a key. */
INLINE __mmask16 seers(__m512i last, int64_t key, int64_t window) {
    __m512i keys = _mm512_set1_epi32(key);
    __mmask16 seen = _mm512_cmpge_epi32_mask(last, keys);
    return window ? seen & _mm512_cmplt_epi32_mask(_mm512_sub_epi32(last, _mm512_set1_epi32(window)), keys) : seen;
}

/* Pairs of weights, 2^(scale * scores) divided, of keys from `start` on for 16 queries, by their scores [keys, 32].
   What weights are divided by stays as long as they do not grow too large (the rule of FlashAttention-4), so that
   hardly any block scales the sums. */
INLINE void weigh(uint32_t *pairs, const float *scores, Group *g, int v, const Queries *all, int64_t start,
                  int64_t num_keys, int are_all_seen) {
    __m512 highest = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(all->scale);
    __m512i last = _mm512_loadu_si512(g->last + v * LANES);
    __mmask16 seen = -1;
    for (int64_t k = 0; k < num_keys; k++) {
        if (!are_all_seen) seen = seers(last, start + k, all->window);
        highest = _mm512_mask_max_ps(highest, seen, highest, _mm512_loadu_ps(scores + k * NUM_TOGETHER));
    }
    highest = _mm512_mul_ps(highest, scale);
    __mmask16 grown = _mm512_cmp_ps_mask(highest, _mm512_add_ps(g->most[v], _mm512_set1_ps(MOST_GROWTH)), _CMP_GT_OQ);
    if (grown) {
        __m512 kept = _mm512_mask_mov_ps(_mm512_set1_ps(1), grown, exp2_of(_mm512_sub_ps(g->most[v], highest)));
        g->most[v] = _mm512_mask_mov_ps(g->most[v], grown, highest);
        g->total[v] = _mm512_mul_ps(g->total[v], kept);
        for (int64_t c = 0; c < all->columns; c++) {
            float *sums = g->sums + c * NUM_TOGETHER + v * LANES;
            _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), kept));
        }
    }
    for (int64_t k = 0; k < num_keys; k += 2, pairs += NUM_TOGETHER) {
        __m512 x[2];
        for (int i = 0; i < 2; i++) {
            x[i] = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + (k + i) * NUM_TOGETHER), scale, g->most[v]));
            if (!are_all_seen) x[i] = _mm512_maskz_mov_ps(seers(last, start + k + i, all->window), x[i]);
        }
        g->total[v] = _mm512_add_ps(g->total[v], _mm512_add_ps(x[0], x[1]));
        _mm512_storeu_si512(pairs, pairs_of(x[0], x[1]));
    }
}

INLINE void product(float *c, int is_added, const bf16 *a, int64_t a_stride, const uint32_t *b, int64_t num_pairs,
                    int64_t num_rows) {
    if (may_use_tiles()) product_of_tiles(c, is_added, a, a_stride, b, num_pairs, num_rows);
    else product_of_vectors(c, is_added, a, a_stride, b, num_pairs, num_rows);
}

/* Adds to a group what it sees in the first keys of a block. */
static void attend_block(const Queries *all, Group *g, const Block *block, int64_t num_keys, int are_all_seen) {
    float scores[NUM_KEYS * NUM_TOGETHER];
    uint32_t weights[NUM_KEYS / 2 * NUM_TOGETHER];
    product(scores, 0, block->keys, all->padded, g->pairs, all->padded / 2, num_keys);
    for (int v = 0; v < 2; v++) {
        uint32_t *pairs = weights + v * LANES;
        if (are_all_seen) weigh(pairs, scores + v * LANES, g, v, all, block->start, num_keys, 1);
        else weigh(pairs, scores + v * LANES, g, v, all, block->start, num_keys, 0);
    }
    product(g->sums, 1, block->values, NUM_KEYS, weights, num_keys / 2, all->columns);
}

/* All queries over all of their keys, from `first` to `last`, block by block. */
static void attend_keys(Queries *all, const bf16 *keys, const bf16 *values, int64_t first, int64_t last) {
    Block block;
    for (block.start = first; block.start <= last; block.start += NUM_KEYS) {
        int64_t start = block.start;
        const bf16 *first_key = keys + start * all->size, *first_value = values + start * all->size;
        pack_block(&block, first_key, first_value, last + 1 - start, all->size, all->padded);
        for (Group *g = all->groups; g < all->groups + all->num_groups; g++) {
            int64_t late = g->last[0], early = g->last[0];
            for (int i = 0; i < NUM_TOGETHER; i++)
                late = g->last[i] > late ? g->last[i] : late, early = g->last[i] < early ? g->last[i] : early;
            if (start > late || (all->window && start + NUM_KEYS <= early + 1 - all->window)) continue;
            int64_t num_keys = late + 1 - start < NUM_KEYS ? (late + 1 - start + 31) / 32 * 32 : NUM_KEYS;
            int are_all_seen = start + num_keys <= early + 1 && (!all->window || start > late - all->window);
            attend_block(all, g, &block, num_keys, are_all_seen);
        }
    }
}

/* What 16 queries of a group attended to, divided by the sum of its weights. */
static void put(bf16 *const *out, const Group *g, int64_t v, int64_t num, int64_t size) {
    __m512 scale = _mm512_div_ps(_mm512_set1_ps(1), g->total[v]);
    for (int64_t c = 0; c < size; c += LANES) {
        __m512i columns[LANES], rows[LANES];
        for (int64_t i = 0; i < LANES; i++)
            columns[i] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(g->sums + (c + i) * NUM_TOGETHER + v * LANES), scale);
        transpose(rows, columns);
        for (int64_t r = 0; r < num; r++)
            _mm256_mask_storeu_epi16(out[r] + c, first_bits(size - c), (__m256i)_mm512_cvtneps_pbh((__m512)rows[r]));
    }
}

/* The queries of some tokens of a piece, from `from` to `end`, of one key head `h`. */
static void attend_part(const Heads *heads, const bf16 *keys, const bf16 *values, int64_t first, int64_t start,
                        int64_t from, int64_t end, int64_t h) {
    Queries all;
    int64_t size = heads->size, per_key = heads->num_heads / heads->num_kv, num = per_key * (end - from);
    const bf16 *queries[MOST_TOGETHER * NUM_TOGETHER];
    bf16 *out[MOST_TOGETHER * NUM_TOGETHER];
    all.size = size, all.window = heads->window, all.scale = heads->scale * 1.44269504;
    all.columns = (size + LANES - 1) / LANES * LANES, all.padded = (size + 31) / 32 * 32;
    all.num_groups = (num + NUM_TOGETHER - 1) / NUM_TOGETHER;
    for (int64_t i = 0; i < all.num_groups * NUM_TOGETHER; i++) {
        int64_t q = i < num ? i : num - 1, t = from + q % (end - from), head = h * per_key + q / (end - from);
        queries[i] = heads->query + (first + t) * heads->q_stride + head * size;
        out[i] = heads->out + ((first + t) * heads->num_heads + head) * size;
        all.groups[i / NUM_TOGETHER].last[i % NUM_TOGETHER] = start + t;
    }
    for (int64_t i = 0; i < all.num_groups; i++) {
        Group *g = all.groups + i;
        memset(g->sums, 0, all.columns * NUM_TOGETHER * sizeof *g->sums);
        for (int v = 0; v < 2; v++) {
            pack_queries(g->pairs + v * LANES, queries + i * NUM_TOGETHER + v * LANES, size);
            g->most[v] = _mm512_set1_ps(-1e30f), g->total[v] = _mm512_setzero_ps();
        }
    }
    int64_t begin = all.window && start + from >= all.window ? start + from - all.window + 1 : 0;
    shape_tiles(2 * LANES); /* all of them full */
    attend_keys(&all, keys, values, begin, start + end - 1);
    release_tiles();
    for (int64_t i = 0; i * LANES < num; i++)
        put(out + i * LANES, all.groups + i / 2, i % 2, num - i * LANES < LANES ? num - i * LANES : LANES, size);
}

void attend_prompt(const Heads *heads, bf16 *keys, bf16 *values, int64_t capacity, int64_t first, int64_t start,
                   int64_t num) {
    int64_t size = heads->size, head = capacity * size;
    int64_t step = MOST_TOGETHER * NUM_TOGETHER * heads->num_kv / heads->num_heads;
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
