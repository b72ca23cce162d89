/* What adapters add to linear layers, each to its own tokens, read where their factors are. */

#include "cpu_kernels.h"

#include <omp.h>

#define MAX_COLUMNS 3072 /* of an output that are computed at a time: rows are read far, one after another */
#define MIN_COLUMNS 256  /* where there are too few adapters for all threads */

/* The second product of one adapter on `num` columns of one layer's output for one token, from column `first` on. */
INLINE void adapt_columns(bf16 *y, const float *low, const Factors *f, const bf16 *bias, int64_t first, int64_t num,
                          int64_t out) {
    float sums[MAX_COLUMNS];
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

void adapt_tokens(bf16 *y, const bf16 *x, const bf16 *bias, const Adapted *adapted, int64_t first,
                  const int64_t *columns, int64_t num_layers, int64_t in) {
    const int64_t *tokens = adapted->tokens, *starts = adapted->starts;
    int64_t num_adapters = adapted->num_adapters, stride = adapted->stride;
    int64_t max_rank = adapted->max_rank, out = columns[num_layers], low_size = num_layers * max_rank;
    const Factors *factors = adapted->factors + first;
    int64_t block = num_adapters < omp_get_num_threads() ? MIN_COLUMNS : MAX_COLUMNS;
    float *low = adapted->scratch;
#pragma omp for collapse(3)
    for (int64_t s = 0; s < num_adapters; s++)
        for (int64_t l = 0; l < num_layers; l++)
            for (int64_t r = 0; r < max_rank; r += 4) {
                const Factors *f = factors + s * stride + l, *next = l + 1 < num_layers ? f + 1 : f - l + stride;
                if ((s + 1 < num_adapters || l + 1 < num_layers) && r < next->rank)
                    prefetch(next->down + r * in, 4 * in);
                for (int64_t t = starts[s]; r < f->rank && t < starts[s + 1]; t++)
                    dots(low + t * low_size + l * max_rank + r, x + tokens[t] * in, f->down + r * in, f->rank - r, in);
            }
#pragma omp for collapse(2)
    for (int64_t s = 0; s < num_adapters; s++)
        for (int64_t start = 0; start < out; start += block)
            for (int64_t l = 0; l < num_layers; l++) {
                const Factors *f = factors + s * stride + l;
                int64_t begin = start > columns[l] ? start : columns[l], width = columns[l + 1] - columns[l];
                int64_t end = start + block < columns[l + 1] ? start + block : columns[l + 1];
                for (int64_t r = 0; s + 1 < num_adapters && begin < end && r < f[stride].rank; r++)
                    prefetch(f[stride].up + r * width + begin - columns[l], end - begin);
                for (int64_t t = starts[s]; f->rank && begin < end && t < starts[s + 1]; t++)
                    adapt_columns(y + tokens[t] * out + begin, low + t * low_size + l * max_rank, f,
                                  bias ? bias + begin : 0, begin - columns[l], end - begin, width);
            }
}

void adapt(bf16 *y, const bf16 *x, const bf16 *bias, const Adapted *adapted, int64_t first, const int64_t *columns,
           int64_t num_layers, int64_t in) {
#pragma omp parallel
    adapt_tokens(y, x, bias, adapted, first, columns, num_layers, in);
}
