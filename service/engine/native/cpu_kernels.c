/* What lies between the matrix products of a decoder layer, in bf16 on a CPU. torch does it in some twenty calls, each
   of which takes longer to start than to compute when few tokens are read. Sums are fp32; tensors are contiguous where
   nothing else is said. `cpu_kernels.py` compiles this and `cpu_attention.c` for the processor at hand and calls them. */

#include "cpu_vectors.h"

#define NUM_COLUMNS 256 /* of an output that are computed at a time */
#define FEW 16384       /* numbers for which a second thread does not pay */

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
