/* The kernels of one decoder layer. All threads of a team call each of these functions with the same arguments and
   share its work; when it returns, all of its results are there. Tensors are contiguous where nothing else is said. */

#pragma once

#include "cpu_vectors.h"

#define MAX_GROUP 32 /* query heads of a key head; the limits of attention, which the caller checks */
#define MAX_SIZE 256 /* of a head */

/* y [tokens, out] = x [tokens, in] W^T + bias [out] + residual [tokens, out], the latter two or null, with W in the
   panels of `cpu_linear.c`; `in` is a multiple of 32. y may be the residual. */
void multiply(bf16 *y, const bf16 *x, const bf16 *panels, const bf16 *bias, const bf16 *residual, int64_t num_tokens,
              int64_t in, int64_t out);

typedef struct {
    const bf16 *down;  /* [rank, in] */
    const bf16 *up;    /* [rank, out], the scale inside */
    const float *gain; /* [out] of DoRA, or null */
    int64_t rank;      /* 0: the adapter leaves this layer alone */
} Factors;

/* Tokens by their adapters. */
typedef struct {
    const int64_t *tokens, *starts; /* those from starts[s] to starts[s + 1] have adapter s */
    int64_t num_adapters;
    const Factors *factors; /* [adapters, stride], one for each layer */
    int64_t stride, max_rank;
    float *scratch;    /* room for [tokens, layers * max_rank] */
    int64_t is_scaled; /* whether any has gains */
} Adapted;

/* Adds to some tokens of y [tokens, out of `num_layers` layers] what their adapters make of x [tokens, in]. The factors
   of these layers begin at `first`; layer l owns the columns from columns[l] to columns[l + 1]. */
void adapt_tokens(bf16 *y, const bf16 *x, const bf16 *bias, const Adapted *adapted, int64_t first,
                  const int64_t *columns, int64_t num_layers, int64_t in);

/* Queries, keys and values of all tokens. Heads of a token lie side by side; from token to token it is `q_stride` in
   the queries, `kv_stride` in keys and values. */
typedef struct {
    bf16 *out; /* [tokens, heads, size] */
    const bf16 *query, *key, *value;
    int64_t q_stride, kv_stride, num_heads, num_kv, size;
    double scale;
    int64_t window; /* 0: none */
} Heads;

/* Some tokens of a step, given by their numbers, rows and positions: their keys and values go into the cache [2, rows,
   key heads, capacity, size], then each attends to what its row holds up to its own position, or to the last `window`
   of that. */
void attend_tokens(const Heads *heads, bf16 *cache, int64_t num_rows, int64_t capacity, const int64_t *tokens,
                   const int64_t *rows, const int64_t *positions, int64_t num);

/* A piece of one prompt, the tokens from `first` on: its keys and values go into its row of the cache, `keys` and
   `values` [key heads, capacity, size], from `start` on, then each of its tokens attends as above. Heads have even
   sizes. Only where a processor has products of bf16. */
void attend_prompt(const Heads *heads, bf16 *keys, bf16 *values, int64_t capacity, int64_t first, int64_t start,
                   int64_t num);

/* Products of tiles, where a processor has them and the system allows them. A thread shapes its tiles for a number of
   tokens up to 32, and releases them before others may want another shape. For `multiply`, tiles 0 to 3 are sums, 4 and
   5 of up to 16 tokens each, 6 and 7 of 16 pairs of inputs; with 32 tokens all have 16 rows, whatever they are for. */
#define BEFORE_TILES() __asm__ volatile("" ::: "memory") /* gcc does not know what a load of tiles reads */
int may_use_tiles(void);
void shape_tiles(int64_t num_tokens);
void release_tiles(void);
