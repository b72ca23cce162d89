/* Attention in bf16 on a CPU, over keys and values in the cache, of any tokens by themselves. */

#include "cpu_kernels.h"

#define NUM_KEYS 128 /* of a block: that many scores are kept at a time */

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
