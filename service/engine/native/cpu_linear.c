/* Matrix products of bf16 on a CPU, of few tokens with weights that are larger than the caches: y = x W^T. W lies in
   panels of 32 outputs, each [in / 32][2 halves][16 pairs of inputs][16 outputs][2], as a processor's products of tiles
   want it, so that a product of few tokens reads memory from one end to the other. Sums are fp32. */

#include "cpu_kernels.h"

#define LANES 16
#define PANEL 32                 /* outputs */
#define STEP 32                  /* inputs that are multiplied at a time */
#define STEP_SIZE (PANEL * STEP) /* numbers of a panel for them */
#define MANY 32                  /* tokens that are multiplied with a panel at a time, by tiles */

/* Some tokens and a panel. */
typedef struct {
    const bf16 *x, *panel;
    int64_t num, in;
    const bf16 *next; /* memory that is read soon, and how many lines of it to fetch in each step */
    int64_t num_lines;
} Block;

INLINE void fetch_lines(const Block *b, int64_t step) {
    for (int64_t i = 0; i < b->num_lines; i++)
        __builtin_prefetch(b->next + (step * b->num_lines + i) * 32, 0, 2);
}

/* sums [num, 32]; `num` is a constant of at least as many tokens as there are. */
#ifdef __AVX512BF16__
#define FEW 12 /* tokens that are multiplied with a panel at a time, by vectors: their sums fill the registers */

INLINE void multiply_few(float *sums, const Block *b, int64_t num) {
    __m512 s[FEW][2];
    const bf16 *rows[FEW];
    for (int64_t r = 0; r < num; r++) {
        rows[r] = b->x + (r < b->num ? r : b->num - 1) * b->in;
        s[r][0] = s[r][1] = _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < b->in / STEP; step++) {
        fetch_lines(b, step);
        for (int64_t p = 0; p < STEP / 2; p++) {
            const bf16 *w = b->panel + step * STEP_SIZE + p * 2 * LANES;
            __m512bh low = (__m512bh)_mm512_loadu_si512(w);
            __m512bh high = (__m512bh)_mm512_loadu_si512(w + STEP_SIZE / 2);
            for (int64_t r = 0; r < num; r++) {
                int32_t pair;
                memcpy(&pair, rows[r] + step * STEP + 2 * p, sizeof pair);
                __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                s[r][0] = _mm512_dpbf16_ps(s[r][0], x, low);
                s[r][1] = _mm512_dpbf16_ps(s[r][1], x, high);
            }
        }
    }
    for (int64_t r = 0; r < b->num; r++) {
        _mm512_storeu_ps(sums + r * PANEL, s[r][0]);
        _mm512_storeu_ps(sums + r * PANEL + LANES, s[r][1]);
    }
}
#else
#define FEW 4

INLINE void multiply_few(float *sums, const Block *b, int64_t num) {
    float s[FEW][PANEL] = {0};
    for (int64_t step = 0; step < b->in / STEP; step++) {
        fetch_lines(b, step);
        for (int64_t p = 0; p < STEP; p += 2) {
            const bf16 *low = b->panel + step * STEP_SIZE + p * LANES, *high = low + STEP_SIZE / 2;
            for (int64_t r = 0; r < num; r++) {
                const bf16 *x = b->x + (r < b->num ? r : b->num - 1) * b->in + step * STEP + p;
                float first = wide(x[0]), second = wide(x[1]);
#pragma omp simd
                for (int64_t i = 0; i < LANES; i++) {
                    s[r][i] += first * wide(low[2 * i]) + second * wide(low[2 * i + 1]);
                    s[r][LANES + i] += first * wide(high[2 * i]) + second * wide(high[2 * i + 1]);
                }
            }
        }
    }
    memcpy(sums, s, b->num * sizeof *s);
}
#endif

static void multiply_vectors(float *sums, const Block *b) {
    if (b->num <= 2) multiply_few(sums, b, 2);
    else if (b->num <= 4) multiply_few(sums, b, 4);
#if FEW > 4
    else if (b->num <= 6) multiply_few(sums, b, 6);
    else if (b->num <= 8) multiply_few(sums, b, 8);
    else if (b->num <= 10) multiply_few(sums, b, 10);
    else multiply_few(sums, b, FEW);
#endif
}

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

#define REQUEST_PERMISSION 0x1023 /* of arch_prctl, and the number of the tiles' state */
#define TILE_DATA 18

int may_use_tiles(void) {
    static int may = -1;
    if (may < 0) may = !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
    return may;
}

static __thread int64_t num_shaped; /* tokens that this thread's tiles are shaped for; 0: they are not in use */

void shape_tiles(int64_t num) {
    if (num == num_shaped || !may_use_tiles()) return;
    num_shaped = num;
    struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t num_rows[16]; } shape = {1};
    int64_t first = num < 16 ? num : 16, second = num > 16 ? num - 16 : 1;
    for (int64_t i = 0; i < 8; i++) {
        shape.row_bytes[i] = 64;
        shape.num_rows[i] = i == 6 || i == 7 ? 16 : i == 2 || i == 3 || i == 5 ? second : first;
    }
    __asm__ volatile("" ::"r"(&shape) : "memory"); /* or else gcc takes only the first bytes for read */
    _tile_loadconfig(&shape);
}

void release_tiles(void) {
    if (num_shaped) _tile_release();
    num_shaped = 0;
}

INLINE void multiply_some_tiles(float *sums, const Block *b, int is_many) {
    int64_t x_bytes = b->in * sizeof(bf16), row_bytes = PANEL * sizeof(float);
    BEFORE_TILES();
    _tile_zero(0);
    _tile_zero(1);
    if (is_many) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < b->in / STEP; step++) {
        const bf16 *x = b->x + step * STEP, *w = b->panel + step * STEP_SIZE;
        fetch_lines(b, step);
        _tile_loadd(4, x, x_bytes);
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + STEP_SIZE / 2, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (is_many) {
            _tile_loadd(5, x + 16 * b->in, x_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, row_bytes);
    _tile_stored(1, sums + LANES, row_bytes);
    if (is_many) {
        _tile_stored(2, sums + 16 * PANEL, row_bytes);
        _tile_stored(3, sums + 16 * PANEL + LANES, row_bytes);
    }
}

static void multiply_tiles(float *sums, const Block *b) {
    shape_tiles(b->num);
    if (b->num > 16) multiply_some_tiles(sums, b, 1);
    else multiply_some_tiles(sums, b, 0);
}
#else
int may_use_tiles(void) { return 0; }
void shape_tiles(int64_t num) {}
void release_tiles(void) {}
static void multiply_tiles(float *sums, const Block *b) {}
#endif

/* Rows of 32 sums, of which the first `columns` count, plus bias and residual, where there are any, into y. */
static void put(bf16 *y, const float *sums, const bf16 *bias, const bf16 *residual, int64_t num, int64_t columns,
                int64_t out) {
    columns = columns < PANEL ? columns : PANEL;
    for (int64_t r = 0; r < num; r++, y += out, sums += PANEL, residual += residual ? out : 0)
#pragma omp simd
        for (int64_t i = 0; i < columns; i++)
            y[i] = narrow(sums[i] + (bias ? wide(bias[i]) : 0) + (residual ? wide(residual[i]) : 0));
}

void multiply(bf16 *y, const bf16 *x, const bf16 *panels, const bf16 *bias, const bf16 *residual, int64_t num_tokens,
              int64_t in, int64_t out) {
    if (num_tokens == 0) return;
    int64_t most = may_use_tiles() ? MANY : FEW, num_blocks = (num_tokens + most - 1) / most;
    int64_t together = most == MANY ? MANY : (num_tokens + num_blocks - 1) / num_blocks;
    int64_t num_panels = (out + PANEL - 1) / PANEL, size = in / STEP * STEP_SIZE;
    int64_t is_foreseen = most == MANY && num_blocks == 1; /* by the processor, which tiles do not keep busy */
    int64_t num_lines = is_foreseen ? 0 : (STEP_SIZE / 32 + num_blocks - 1) / num_blocks;
    float sums[MANY * PANEL];
#pragma omp for schedule(static)
    for (int64_t p = 0; p < num_panels; p++)
        for (int64_t t = 0; t < num_tokens; t += together) {
            int64_t num = num_tokens - t < together ? num_tokens - t : together, at = t * out + p * PANEL;
            const bf16 *next = panels + (p + 1) * size + t / together * num_lines * 32 * (in / STEP);
            Block block = {x + t * in, panels + p * size, num, in, next, num_lines};
            if (most == MANY) multiply_tiles(sums, &block);
            else multiply_vectors(sums, &block);
            put(y + at, sums, bias ? bias + p * PANEL : 0, residual ? residual + at : 0, num, out - p * PANEL, out);
        }
    release_tiles();
}

void linear(bf16 *y, const bf16 *x, const bf16 *panels, const bf16 *bias, const bf16 *residual, int64_t num_tokens,
            int64_t in, int64_t out) {
#pragma omp parallel
    multiply(y, x, panels, bias, residual, num_tokens, in, out);
}
