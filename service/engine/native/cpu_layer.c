/* A decoder layer of the Llama family on a CPU, all of it in one call: its threads start once, not for each of a dozen
   small operations. x + o(attention(rotary(qkv(norm x)))), then x + down(silu(gate) up) of norm x. */

#include "cpu_kernels.h"

/* Linear layers that read the same input; their outputs lie side by side. */
typedef struct {
    const bf16 *panels, *bias; /* the latter or null */
    int64_t in, out;
    int64_t first, num_layers; /* among all that adapters may target */
    const int64_t *columns;    /* where the outputs of each begin */
} Group;

typedef struct {
    Group qkv, o, gate_up, down;
    const bf16 *norm, *mlp_norm, *head_norms; /* the last [heads of queries and keys, size], or null */
    double norm_eps, mlp_norm_eps, head_norm_eps, scale;
    int64_t num_heads, num_kv, size, window, number;
} Layer;

/* Tokens that attend in one way: any of one pool of rows, or a piece of a prompt. */
typedef struct {
    bf16 *states; /* [layers, 2, rows, key heads, capacity, size] */
    int64_t num_rows, capacity;
    const int64_t *tokens, *rows, *positions; /* null: a piece */
    int64_t row, first, start;                /* of a piece */
    int64_t num;
} Part;

typedef struct {
    bf16 *x; /* [tokens, width], in place */
    bf16 *normed, *qkv, *attended, *gate_up, *gated; /* room for what their names say, of all tokens */
    const bf16 *cosine, *sine;                       /* [tokens, size] */
    int64_t num_tokens;
    const Part *parts;
    int64_t num_parts;
    const Adapted *adapted; /* or null */
} Step;

INLINE void normed(bf16 *out, const bf16 *x, const bf16 *weight, float eps, int64_t width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += wide(x[i]) * wide(x[i]);
    float scale = 1.0f / sqrtf(sum / width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) out[i] = narrow(wide(x[i]) * scale * wide(weight[i]));
}

static void norm_tokens(bf16 *out, const bf16 *x, const bf16 *weight, double eps, int64_t num, int64_t width) {
#pragma omp for
    for (int64_t t = 0; t < num; t++) normed(out + t * width, x + t * width, weight, eps, width);
}

static void gate(bf16 *out, const bf16 *gate_up, int64_t num, int64_t width) {
#pragma omp for
    for (int64_t t = 0; t < num; t++) {
        const bf16 *gate = gate_up + t * 2 * width, *up = gate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = wide(gate[i]);
            out[t * width + i] = narrow(g / (1.0f + exp_of(-g)) * wide(up[i]));
        }
    }
}

/* Rotary embedding of queries and keys, after their norms. */
static void rotate(bf16 *qkv, const Layer *layer, const Step *step) {
    int64_t size = layer->size, half = size / 2, num_rotated = layer->num_heads + layer->num_kv;
#pragma omp for
    for (int64_t t = 0; t < step->num_tokens; t++) {
        const bf16 *c = step->cosine + t * size, *s = step->sine + t * size;
        for (int64_t h = 0; h < num_rotated; h++) {
            bf16 *a = qkv + t * layer->qkv.out + h * size, *b = a + half;
            if (layer->head_norms) normed(a, a, layer->head_norms + h * size, layer->head_norm_eps, size);
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float first = wide(a[i]), second = wide(b[i]);
                a[i] = narrow(first * wide(c[i]) - second * wide(s[i]));
                b[i] = narrow(second * wide(c[half + i]) + first * wide(s[half + i]));
            }
        }
    }
}

/* y = residual + what the group and the adapters make of x; without residual if that is null. */
static void apply(bf16 *y, const bf16 *x, const Group *group, bf16 *residual, const Step *step) {
    int64_t num = step->num_tokens;
    multiply(y, x, group->panels, group->bias, residual, num, group->in, group->out);
    if (step->adapted)
        adapt_tokens(y, x, group->bias, step->adapted, group->first, group->columns, group->num_layers, group->in);
}

/* x = x + what the group and the adapters make of `from`. DoRA scales that, so it is kept apart in `room`. */
static void add(bf16 *x, const bf16 *from, const Group *group, bf16 *room, const Step *step) {
    if (!step->adapted || !step->adapted->is_scaled) {
        apply(x, from, group, x, step);
        return;
    }
    apply(room, from, group, 0, step);
#pragma omp for
    for (int64_t t = 0; t < step->num_tokens; t++)
#pragma omp simd
        for (int64_t i = t * group->out; i < (t + 1) * group->out; i++) x[i] = narrow(wide(x[i]) + wide(room[i]));
}

static void attend_all(const Layer *layer, const Step *step) {
    const bf16 *key = step->qkv + layer->num_heads * layer->size, *value = key + layer->num_kv * layer->size;
    Heads heads = {step->attended, step->qkv,     key,         value,        layer->qkv.out, layer->qkv.out,
                   layer->num_heads, layer->num_kv, layer->size, layer->scale, layer->window};
    for (const Part *part = step->parts; part < step->parts + step->num_parts; part++) {
        int64_t row = layer->num_kv * part->capacity * layer->size, num_rows = part->num_rows;
        bf16 *keys = part->states + layer->number * 2 * num_rows * row, *values = keys + num_rows * row;
        if (part->tokens)
            attend_tokens(&heads, keys, num_rows, part->capacity, part->tokens, part->rows, part->positions, part->num);
#ifdef __AVX512BF16__
        else
            attend_prompt(&heads, keys + part->row * row, values + part->row * row, part->capacity, part->first,
                          part->start, part->num);
#endif
    }
}

void decoder_layer(const Layer *layer, const Step *step) {
    int64_t num = step->num_tokens;
#pragma omp parallel
    {
        norm_tokens(step->normed, step->x, layer->norm, layer->norm_eps, num, layer->qkv.in);
        apply(step->qkv, step->normed, &layer->qkv, 0, step);
        rotate(step->qkv, layer, step);
        attend_all(layer, step);
        add(step->x, step->attended, &layer->o, step->normed, step);
        norm_tokens(step->normed, step->x, layer->mlp_norm, layer->mlp_norm_eps, num, layer->gate_up.in);
        apply(step->gate_up, step->normed, &layer->gate_up, 0, step);
        gate(step->gated, step->gate_up, num, layer->down.in);
        add(step->x, step->gated, &layer->down, step->normed, step);
    }
}
