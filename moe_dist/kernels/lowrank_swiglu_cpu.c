/* Fused low-rank SwiGLU of clustered experts (called by moe_dist/kernels/lowrank_swiglu_cpu.py).
 *
 * For every token t and every slot k that holds an expert e = slot[t][k], with p = gate[t][k]:
 *
 *     g = pre_gate[t] + z_gate[t][e] Vg[e] + bias_gate[e]         u = likewise with pre_up, z_up, Vu
 *     h = silu(g) * u * scale[e]
 *     hidden[t]   += p * h                                        thin[t][e] = p * (h Uo[e])
 *
 * The backward pass recomputes g, u and h instead of reading k saved copies of them.
 *
 * Loop nest, from outside to inside: tiles of the hidden width (the factors of one expert stay in L1); chunks of tokens
 * (their part of `pre` stays in L2); experts (their factors are copied to contiguous memory, and their gradients are
 * summed there); the chunk's slots of that expert; SIMD vectors. A call covers the columns [first, last) only: threads
 * compute disjoint columns, and `thin`, `d_z` and `d_gate` are partial sums over them.
 *
 * Compiled with -DRANK=r; -DBFLOAT16 makes the wide tensors (pre, hidden and their gradients) bfloat16, all others stay
 * float32 and so does the arithmetic. Plain C with the vector extensions of GCC and Clang.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) && !defined(SCALAR)
#include <immintrin.h>
#endif

/* Vectors as wide as the processor's: the compiler splits wider ones, which takes minutes and spills all registers. */
#if defined(SCALAR)
#define LANES 1
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define WIDTH 4     /* vectors computed together: hides the latency of the fused multiply-add */
#define TILE 128    /* columns */
#define CHUNK 128   /* tokens */
#define SLOTS 2     /* slots of one expert computed together in the backward pass: its sums are updated once for both */
#define AHEAD 4     /* prefetch distance in slots */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float memory_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* unaligned, in a tensor */
#define INLINE static inline __attribute__((always_inline))

#ifdef BFLOAT16
typedef uint16_t wide;
typedef uint16_t wide_vec __attribute__((vector_size(2 * LANES)));
typedef uint16_t memory_wide_vec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
#if LANES == 16 /* same as the generic version below, for which GCC 12 generates eight moves through the stack */
INLINE uvec widen(wide_vec x) { return (uvec)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE wide_vec narrow(uvec x) { return (wide_vec)_mm512_cvtepi32_epi16((__m512i)x); }
#else
INLINE uvec widen(wide_vec x) { return __builtin_convertvector(x, uvec); }
INLINE wide_vec narrow(uvec x) { return __builtin_convertvector(x, wide_vec); }
#endif
INLINE vec load(const wide *p) { return (vec)(widen(*(const memory_wide_vec *)p) << 16); }
INLINE void store(wide *p, vec x) { /* round to nearest even; a NaN stays a NaN */
    uvec b = (uvec)x, rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    uvec is_nan = (uvec)(x != x);
    *(memory_wide_vec *)p = narrow((rounded & ~is_nan) | (0x7fc0 & is_nan));
}
#else
typedef float wide;
INLINE vec load(const wide *p) { return *(const memory_vec *)p; }
INLINE void store(wide *p, vec x) { *(memory_vec *)p = x; }
#endif

INLINE vec at(const float *p) { return *(const memory_vec *)p; }
INLINE void add_to(float *p, vec x) { *(memory_vec *)p += x; }
INLINE vec zero(void) { return (vec){0}; }

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

/* Horizontal sums: out[i] += sum of the lanes of x[i], for LANES vectors at a time. FOLD_n of two vectors adds the two
 * halves of each of their parts of 2 n lanes; the result holds the sums of both vectors in parts of n lanes. */
#define HALVES(a, b, low, high) (__builtin_shufflevector(a, b, UNPACK low) + __builtin_shufflevector(a, b, UNPACK high))
#define UNPACK(...) __VA_ARGS__
#if LANES == 16
#define FOLD_8(a, b)                                                                                        \
    HALVES(a, b, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),                                  \
           (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define FOLD_4(a, b)                                                                                        \
    HALVES(a, b, (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),                                \
           (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define FOLD_2(a, b)                                                                                        \
    HALVES(a, b, (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),                                \
           (2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
#define FOLD_1(a, b)                                                                                        \
    HALVES(a, b, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),                               \
           (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#elif LANES == 8
#define FOLD_4(a, b) HALVES(a, b, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
#define FOLD_2(a, b) HALVES(a, b, (0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15))
#define FOLD_1(a, b) HALVES(a, b, (0, 2, 4, 6, 8, 10, 12, 14), (1, 3, 5, 7, 9, 11, 13, 15))
#elif LANES == 4
#define FOLD_2(a, b) HALVES(a, b, (0, 1, 4, 5), (2, 3, 6, 7))
#define FOLD_1(a, b) HALVES(a, b, (0, 2, 4, 6), (1, 3, 5, 7))
#endif
INLINE void add_sums(float *out, const vec *x, int count) {
    for (int base = 0; base < count; base += LANES) {
        vec y[LANES];
        for (int i = 0; i < LANES; i++) y[i] = base + i < count ? x[base + i] : zero();
#if LANES > 8
        for (int i = 0; i < 8; i++) y[i] = FOLD_8(y[2 * i], y[2 * i + 1]);
#endif
#if LANES > 4
        for (int i = 0; i < 4; i++) y[i] = FOLD_4(y[2 * i], y[2 * i + 1]);
#endif
#if LANES > 1
        for (int i = 0; i < 2; i++) y[i] = FOLD_2(y[2 * i], y[2 * i + 1]);
        y[0] = FOLD_1(y[0], y[1]);
#endif
        if (count - base >= LANES) add_to(out + base, y[0]);
        else
            for (int i = base; i < count; i++) out[i] += y[0][i - base];
    }
}

/* exp by the Cephes polynomial on [-ln2/2, ln2/2], accurate to 2 ulp; the argument is clamped to avoid overflow. */
INLINE vec exponential(vec x) {
    x = choose(x > 88.0f, zero() + 88.0f, x);
    x = choose(x < -87.0f, zero() - 87.0f, x);
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer kept in the low bits */
    vec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}
INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

/* Sizes and inputs of one call. Strides are in elements. */
typedef struct {
    int64_t tokens, experts, slots, hidden, first, last;
    const wide *pre;       /* [tokens, 2 hidden] */
    const float *z;        /* [tokens, experts, 2 RANK] */
    const int64_t *slot;   /* [tokens, slots] */
    const float *gate;     /* [tokens, slots] */
    const float *in_v;     /* [experts, 2, RANK, hidden] */
    const float *out_u;    /* [experts, RANK, hidden] */
    const float *scale;    /* [experts, hidden] or null */
    const float *bias;     /* [experts, 2 hidden] or null */
} problem;

/* Slots sorted by group = (chunk, expert). entry = token * slots + slot; begin[group] is the group's first entry. */
typedef struct { int64_t *entry, *begin; } schedule;

enum { DONE = 0, NO_MEMORY = 1, NO_SUCH_EXPERT = 2 }; /* status returned by forward and backward */

static int schedule_slots(const problem *p, schedule *s) {
    int64_t chunks = (p->tokens + CHUNK - 1) / CHUNK, groups = chunks * p->experts;
    s->begin = calloc(groups + 2, sizeof(int64_t));
    s->entry = calloc(p->tokens * p->slots + AHEAD, sizeof(int64_t));
    if (!s->begin || !s->entry) return NO_MEMORY;
    int64_t *next = s->begin + 1; /* first counts, then the index of each group's next entry, finally its end */
    for (int64_t i = 0; i < p->tokens * p->slots; i++) {
        if (p->slot[i] >= p->experts) return NO_SUCH_EXPERT;
        if (p->slot[i] >= 0) next[i / p->slots / CHUNK * p->experts + p->slot[i] + 1]++;
    }
    for (int64_t g = 0; g < groups; g++) next[g + 1] += next[g];
    for (int64_t i = 0; i < p->tokens * p->slots; i++)
        if (p->slot[i] >= 0) s->entry[next[i / p->slots / CHUNK * p->experts + p->slot[i]]++] = i;
    return DONE;
}

static void discard(schedule *s) {
    free(s->begin);
    free(s->entry);
}

/* Prefetch a row. Rows are read in the order of experts, which a hardware prefetcher cannot predict. */
INLINE void prefetch(const wide *row, int64_t columns) {
    for (int64_t f = 0; f < columns; f += 64 / sizeof(wide)) __builtin_prefetch(row + f);
}

/* One expert's weights in a tile, or their gradients, copied to contiguous memory. */
typedef struct { float vg[RANK][TILE], vu[RANK][TILE], uo[RANK][TILE], scale[TILE], bias_g[TILE], bias_u[TILE]; } panel;

INLINE void copy_columns(float *to, const float *from, int64_t columns) { memcpy(to, from, columns * sizeof(float)); }

/* Copy one expert's weights to a panel. Without expert vectors the scale is one and the biases are zero. */
static void read_panel(panel *x, const problem *p, int64_t e, int64_t tile, int64_t columns) {
    const float *v = p->in_v + e * 2 * RANK * p->hidden + tile, *u = p->out_u + e * RANK * p->hidden + tile;
    for (int i = 0; i < RANK; i++) {
        copy_columns(x->vg[i], v + i * p->hidden, columns);
        copy_columns(x->vu[i], v + (RANK + i) * p->hidden, columns);
        copy_columns(x->uo[i], u + i * p->hidden, columns);
    }
    for (int f = 0; f < TILE; f++) {
        x->scale[f] = 1;
        x->bias_g[f] = x->bias_u[f] = 0;
    }
    if (p->scale) copy_columns(x->scale, p->scale + e * p->hidden + tile, columns);
    if (p->bias) {
        copy_columns(x->bias_g, p->bias + e * 2 * p->hidden + tile, columns);
        copy_columns(x->bias_u, p->bias + (e * 2 + 1) * p->hidden + tile, columns);
    }
}

/* Compute g and u of one slot for `width` vectors from column f of the tile. pre: the token's row in the tile; z: the
 * 2 RANK coefficients of the slot. */
INLINE void projections(const panel *x, const wide *pre, int64_t hidden, const float *z, int64_t f, int width, vec *g,
                        vec *u) {
    for (int w = 0; w < width; w++) {
        g[w] = load(pre + f + w * LANES) + at(x->bias_g + f + w * LANES);
        u[w] = load(pre + hidden + f + w * LANES) + at(x->bias_u + f + w * LANES);
    }
    for (int i = 0; i < RANK; i++)
        for (int w = 0; w < width; w++) {
            g[w] += z[i] * at(x->vg[i] + f + w * LANES);
            u[w] += z[RANK + i] * at(x->vu[i] + f + w * LANES);
        }
}

INLINE void forward_block(const panel *x, const wide *pre, int64_t hidden, const float *z, float weight, int64_t f,
                          int width, float *sum, vec *thin) {
    vec g[WIDTH], u[WIDTH];
    projections(x, pre, hidden, z, f, width, g, u);
    for (int w = 0; w < width; w++) {
        g[w] = g[w] * sigmoid(g[w]) * u[w] * weight * at(x->scale + f + w * LANES);
        add_to(sum + f + w * LANES, g[w]);
    }
    for (int i = 0; i < RANK; i++)
        for (int w = 0; w < width; w++) thin[i] += g[w] * at(x->uo[i] + f + w * LANES);
}

static void forward_slot(const panel *x, const wide *pre, int64_t hidden, const float *z, float weight, int64_t columns,
                         float *sum, float *out) {
    int64_t f = 0;
    vec thin[RANK];
    for (int j = 0; j < RANK; j++) thin[j] = zero();
    for (; f + WIDTH * LANES <= columns; f += WIDTH * LANES)
        forward_block(x, pre, hidden, z, weight, f, WIDTH, sum, thin);
    for (; f < columns; f += LANES) forward_block(x, pre, hidden, z, weight, f, 1, sum, thin);
    add_sums(out, thin, RANK);
}

/* Forward pass. Outputs: hidden_out [tokens, hidden]; thin [tokens, experts, RANK], zeroed by the caller. */
int forward(int64_t tokens, int64_t experts, int64_t slots, int64_t hidden, int64_t first, int64_t last,
            const wide *pre, const int64_t *slot, const float *z, const float *gate, const float *in_v,
            const float *out_u, const float *scale, const float *bias, wide *hidden_out, float *thin) {
    problem p = {tokens, experts, slots, hidden, first, last, pre, z, slot, gate, in_v, out_u, scale, bias};
    schedule s;
    int status = schedule_slots(&p, &s);
    float sums[CHUNK][TILE] __attribute__((aligned(64)));
    panel x __attribute__((aligned(64)));
    for (int64_t tile = first; status == DONE && tile < last; tile += TILE) {
        int64_t columns = tile + TILE < last ? TILE : last - tile;
        for (int64_t c = 0; c * CHUNK < tokens; c++) {
            memset(sums, 0, sizeof(sums));
            for (int64_t e = 0; e < experts; e++) {
                int64_t j = s.begin[c * experts + e], stop = s.begin[c * experts + e + 1];
                if (j < stop) read_panel(&x, &p, e, tile, columns);
                for (; j < stop; j++) {
                    const wide *ahead = pre + s.entry[j + AHEAD] / slots * 2 * hidden + tile;
                    prefetch(ahead, columns);
                    prefetch(ahead + hidden, columns);
                    int64_t t = s.entry[j] / slots, of_expert = t * experts + e;
                    forward_slot(&x, pre + t * 2 * hidden + tile, hidden, z + of_expert * 2 * RANK, gate[s.entry[j]],
                                 columns, sums[t - c * CHUNK], thin + of_expert * RANK);
                }
            }
            for (int64_t t = c * CHUNK; t < tokens && t < (c + 1) * CHUNK; t++)
                for (int64_t f = 0; f < columns; f += LANES)
                    store(hidden_out + t * hidden + tile + f, at(sums[t - c * CHUNK] + f));
        }
    }
    discard(&s);
    return status;
}

/* Gradients of the weights, in the layouts of the weights; the backward pass adds to them. */
typedef struct { float *d_in_v, *d_out_u, *d_scale, *d_bias; } gradients;

INLINE void add_columns(float *to, const float *from, int64_t columns) {
    for (int64_t f = 0; f < columns; f += LANES) add_to(to + f, at(from + f));
}

static void add_panel(const panel *x, const problem *p, const gradients *d, int64_t e, int64_t tile, int64_t columns) {
    float *v = d->d_in_v + e * 2 * RANK * p->hidden + tile, *u = d->d_out_u + e * RANK * p->hidden + tile;
    for (int i = 0; i < RANK; i++) {
        add_columns(v + i * p->hidden, x->vg[i], columns);
        add_columns(v + (RANK + i) * p->hidden, x->vu[i], columns);
        add_columns(u + i * p->hidden, x->uo[i], columns);
    }
    if (d->d_scale) add_columns(d->d_scale + e * p->hidden + tile, x->scale, columns);
    if (d->d_bias) {
        add_columns(d->d_bias + e * 2 * p->hidden + tile, x->bias_g, columns);
        add_columns(d->d_bias + (e * 2 + 1) * p->hidden + tile, x->bias_u, columns);
    }
}

/* One slot in the backward pass: its inputs, the rows in which its share of d_pre is summed, and its sums over columns,
 * kept as vectors until the tile is done. */
typedef struct {
    const wide *pre, *d_hidden;
    const float *z, *d_thin;
    float weight, *d_g, *d_u;
    vec d_z[2 * RANK], d_weight;
} backward_slot;

INLINE void backward_block(const panel *x, panel *d, backward_slot *slot, int count, int64_t hidden, int64_t f,
                           int width) {
    vec g[SLOTS][WIDTH], u[SLOTS][WIDTH], h[SLOTS][WIDTH];
    for (int s = 0; s < count; s++) {
        vec q[WIDTH];
        projections(x, slot[s].pre, hidden, slot[s].z, f, width, g[s], u[s]);
        for (int w = 0; w < width; w++) q[w] = load(slot[s].d_hidden + f + w * LANES);
        for (int i = 0; i < RANK; i++)
            for (int w = 0; w < width; w++) q[w] += slot[s].d_thin[i] * at(x->uo[i] + f + w * LANES);
        for (int w = 0; w < width; w++) { /* from here on g and u hold their gradients */
            vec sig = sigmoid(g[s][w]), silu = g[s][w] * sig, d_h = q[w] * slot[s].weight;
            vec scale = at(x->scale + f + w * LANES);
            h[s][w] = silu * u[s][w];
            add_to(d->scale + f + w * LANES, d_h * h[s][w]);
            h[s][w] *= scale;
            d_h *= scale;
            slot[s].d_weight += q[w] * h[s][w];
            h[s][w] *= slot[s].weight;
            g[s][w] = d_h * u[s][w] * sig * (1.0f + g[s][w] - silu);
            u[s][w] = d_h * silu;
            add_to(slot[s].d_g + f + w * LANES, g[s][w]);
            add_to(slot[s].d_u + f + w * LANES, u[s][w]);
            add_to(d->bias_g + f + w * LANES, g[s][w]);
            add_to(d->bias_u + f + w * LANES, u[s][w]);
        }
    }
    for (int i = 0; i < RANK; i++)
        for (int w = 0; w < width; w++) {
            int64_t at_w = f + w * LANES;
            vec vg = at(x->vg[i] + at_w), vu = at(x->vu[i] + at_w);
            vec d_vg = at(d->vg[i] + at_w), d_vu = at(d->vu[i] + at_w), d_uo = at(d->uo[i] + at_w);
            for (int s = 0; s < count; s++) {
                slot[s].d_z[i] += g[s][w] * vg;
                slot[s].d_z[RANK + i] += u[s][w] * vu;
                d_vg += slot[s].z[i] * g[s][w];
                d_vu += slot[s].z[RANK + i] * u[s][w];
                d_uo += slot[s].d_thin[i] * h[s][w];
            }
            *(memory_vec *)(d->vg[i] + at_w) = d_vg;
            *(memory_vec *)(d->vu[i] + at_w) = d_vu;
            *(memory_vec *)(d->uo[i] + at_w) = d_uo;
        }
}

INLINE void backward_slots(const panel *x, panel *d, backward_slot *slot, int count, int64_t hidden, int64_t columns) {
    int64_t f = 0;
    for (; f + WIDTH * LANES <= columns; f += WIDTH * LANES) backward_block(x, d, slot, count, hidden, f, WIDTH);
    for (; f < columns; f += LANES) backward_block(x, d, slot, count, hidden, f, 1);
}

/* Backward pass. Output: d_pre [tokens, 2 hidden]; all other gradients are added to buffers zeroed by the caller. */
int backward(int64_t tokens, int64_t experts, int64_t slots, int64_t hidden, int64_t first, int64_t last,
             const wide *pre, const int64_t *slot, const float *z, const float *gate, const float *in_v,
             const float *out_u, const float *scale, const float *bias, const wide *d_hidden, const float *d_thin,
             wide *d_pre, float *d_z, float *d_gate, float *d_in_v, float *d_out_u, float *d_scale, float *d_bias) {
    problem p = {tokens, experts, slots, hidden, first, last, pre, z, slot, gate, in_v, out_u, scale, bias};
    gradients of_weights = {d_in_v, d_out_u, d_scale, d_bias};
    schedule s;
    int status = schedule_slots(&p, &s);
    float d_g[CHUNK][TILE] __attribute__((aligned(64))), d_u[CHUNK][TILE] __attribute__((aligned(64)));
    panel x __attribute__((aligned(64))), d __attribute__((aligned(64)));
    for (int64_t tile = first; status == DONE && tile < last; tile += TILE) {
        int64_t columns = tile + TILE < last ? TILE : last - tile;
        for (int64_t c = 0; c * CHUNK < tokens; c++) {
            memset(d_g, 0, sizeof(d_g));
            memset(d_u, 0, sizeof(d_u));
            for (int64_t e = 0; e < experts; e++) {
                int64_t j = s.begin[c * experts + e], stop = s.begin[c * experts + e + 1];
                if (j == stop) continue;
                read_panel(&x, &p, e, tile, columns);
                memset(&d, 0, sizeof(d));
                while (j < stop) {
                    backward_slot pair[SLOTS];
                    int count = stop - j < SLOTS ? stop - j : SLOTS;
                    for (int i = 0; i < count; i++) {
                        int64_t t = s.entry[j + i] / slots, row = t - c * CHUNK, ahead = s.entry[j + i + AHEAD] / slots;
                        prefetch(pre + ahead * 2 * hidden + tile, columns);
                        prefetch(pre + (ahead * 2 + 1) * hidden + tile, columns);
                        prefetch(d_hidden + ahead * hidden + tile, columns);
                        pair[i] = (backward_slot){
                            .pre = pre + t * 2 * hidden + tile, .d_hidden = d_hidden + t * hidden + tile,
                            .z = z + (t * experts + e) * 2 * RANK, .d_thin = d_thin + (t * experts + e) * RANK,
                            .weight = gate[s.entry[j + i]], .d_g = d_g[row], .d_u = d_u[row]};
                    }
                    if (count == SLOTS) backward_slots(&x, &d, pair, SLOTS, hidden, columns);
                    else for (int i = 0; i < count; i++) backward_slots(&x, &d, pair + i, 1, hidden, columns);
                    for (int i = 0; i < count; i++, j++) {
                        add_sums(d_z + (s.entry[j] / slots * experts + e) * 2 * RANK, pair[i].d_z, 2 * RANK);
                        add_sums(d_gate + s.entry[j], &pair[i].d_weight, 1);
                    }
                }
                add_panel(&d, &p, &of_weights, e, tile, columns);
            }
            for (int64_t t = c * CHUNK; t < tokens && t < (c + 1) * CHUNK; t++)
                for (int64_t f = 0; f < columns; f += LANES) {
                    store(d_pre + t * 2 * hidden + tile + f, at(d_g[t - c * CHUNK] + f));
                    store(d_pre + (t * 2 + 1) * hidden + tile + f, at(d_u[t - c * CHUNK] + f));
                }
        }
    }
    discard(&s);
    return status;
}
