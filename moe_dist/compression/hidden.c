/* The hidden step of clustered experts, in one pass through the cache (moe_dist/compression/hidden_compiled.py).
 *
 * For every token t and every slot k that names an expert e = slot[t][k], with p = gate[t][k]:
 *
 *     g = pre_gate[t] + z_gate[t][e] Vg[e] + bias_gate[e]         u = likewise with pre_up, z_up, Vu
 *     h = silu(g) * u * scale[e]
 *     hidden[t]   += p * h                                        thin[t][e] = p * (h Uo[e])
 *
 * and its gradient, which recomputes g, u and h instead of reading k saved copies of them.
 *
 * Loops: a tile of the hidden width (so that the factors of one expert stay in L1), a chunk of tokens (so that its part
 * of `pre` stays in L2), the experts, the chunk's slots of that expert, vectors. A call covers the columns
 * [first, last) only: threads take disjoint columns, and `thin`, `d_z` and `d_gate` are partial sums over them.
 *
 * Compiled with -DRANK=r; -DBFLOAT16 makes the wide tensors (pre, hidden and their gradients) bfloat16, all others stay
 * float32 and so does the arithmetic. Plain C with the vector extensions of GCC and Clang.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define WIDTH 4     /* vectors computed together: hides the latency of the fused multiply-add */
#define TILE 128    /* columns */
#define CHUNK 128   /* tokens */
#define AHEAD 4     /* slots: how far memory is asked for in advance */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float memory_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* in a tensor */
#define INLINE static inline __attribute__((always_inline))

#ifdef BFLOAT16
typedef uint16_t wide;
typedef uint16_t wide_vec __attribute__((vector_size(2 * LANES)));
typedef uint16_t memory_wide_vec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
#ifdef __AVX512F__ /* as the line below means, but GCC 12 makes eight moves through the stack of that */
INLINE uvec widen(wide_vec x) { return (uvec)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE wide_vec narrow(uvec x) { return (wide_vec)_mm512_cvtepi32_epi16((__m512i)x); }
#else
INLINE uvec widen(wide_vec x) { return __builtin_convertvector(x, uvec); }
INLINE wide_vec narrow(uvec x) { return __builtin_convertvector(x, wide_vec); }
#endif
INLINE vec load(const wide *p) { return (vec)(widen(*(const memory_wide_vec *)p) << 16); }
INLINE void store(wide *p, vec x) { /* round to nearest even; a NaN stays one */
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

/* out[i] += the sum of x[i]'s lanes, for sixteen vectors at a time in four rounds of adding halves. */
#define HALVES(a, b, low, high) (__builtin_shufflevector(a, b, UNPACK low) + __builtin_shufflevector(a, b, UNPACK high))
#define UNPACK(...) __VA_ARGS__
INLINE void add_sums(float *out, const vec *x, int count) {
    for (int base = 0; base < count; base += LANES) {
        vec y[LANES];
        for (int i = 0; i < LANES; i++) y[i] = base + i < count ? x[base + i] : zero();
        for (int i = 0; i < 8; i++)
            y[i] = HALVES(y[2 * i], y[2 * i + 1], (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                          (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
        for (int i = 0; i < 4; i++)
            y[i] = HALVES(y[2 * i], y[2 * i + 1], (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                          (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
        for (int i = 0; i < 2; i++)
            y[i] = HALVES(y[2 * i], y[2 * i + 1], (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
                          (2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31));
        y[0] = HALVES(y[0], y[1], (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                      (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
        if (count - base >= LANES) add_to(out + base, y[0]);
        else
            for (int i = base; i < count; i++) out[i] += y[0][i - base];
    }
}

/* exp by the Cephes polynomial on [-ln2/2, ln2/2], within 2 units in the last place; clamped short of overflow. */
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

/* Everything the loops share. Strides are in elements. */
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

/* The slots sorted by (chunk, expert): entry = token * slots + slot; a group's entries are begin[group] and on. */
typedef struct { int64_t *entry, *begin; } schedule;

enum { DONE = 0, NO_MEMORY = 1, NO_SUCH_EXPERT = 2 }; /* what forward and backward return */

static int schedule_slots(const problem *p, schedule *s) {
    int64_t chunks = (p->tokens + CHUNK - 1) / CHUNK, groups = chunks * p->experts;
    s->begin = calloc(groups + 2, sizeof(int64_t));
    s->entry = calloc(p->tokens * p->slots + AHEAD, sizeof(int64_t));
    if (!s->begin || !s->entry) return NO_MEMORY;
    int64_t *next = s->begin + 1; /* counts, then where a group's next entry goes, then where it ends */
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

/* Rows are far apart and come in the experts' order, which no hardware prefetcher guesses. */
INLINE void prefetch(const wide *row, int64_t columns) {
    for (int64_t f = 0; f < columns; f += 64 / sizeof(wide)) __builtin_prefetch(row + f);
}

/* g and u of one slot at `width` vectors from column f; z: its 2 RANK coefficients. */
INLINE void projections(const problem *p, int64_t t, int64_t e, const float *z, int64_t f, int width, vec *g, vec *u) {
    const wide *pre = p->pre + t * 2 * p->hidden + f;
    const float *vg = p->in_v + e * 2 * RANK * p->hidden + f, *vu = vg + RANK * p->hidden;
    for (int w = 0; w < width; w++) {
        g[w] = load(pre + w * LANES);
        u[w] = load(pre + p->hidden + w * LANES);
        if (p->bias) {
            g[w] += at(p->bias + e * 2 * p->hidden + f + w * LANES);
            u[w] += at(p->bias + (e * 2 + 1) * p->hidden + f + w * LANES);
        }
    }
    for (int i = 0; i < RANK; i++) {
        vec z_g = zero() + z[i], z_u = zero() + z[RANK + i];
        for (int w = 0; w < width; w++) {
            g[w] += z_g * at(vg + i * p->hidden + w * LANES);
            u[w] += z_u * at(vu + i * p->hidden + w * LANES);
        }
    }
}

INLINE void forward_block(const problem *p, int64_t t, int64_t e, const float *z, float weight, int64_t f, int width,
                          float *hidden, vec *thin) {
    vec g[WIDTH], u[WIDTH];
    projections(p, t, e, z, f, width, g, u);
    for (int w = 0; w < width; w++) {
        vec h = g[w] * sigmoid(g[w]) * u[w] * weight;
        if (p->scale) h *= at(p->scale + e * p->hidden + f + w * LANES);
        add_to(hidden + w * LANES, h);
        g[w] = h;
    }
    const float *uo = p->out_u + e * RANK * p->hidden + f;
    for (int i = 0; i < RANK; i++)
        for (int w = 0; w < width; w++) thin[i] += g[w] * at(uo + i * p->hidden + w * LANES);
}

static void forward_slot(const problem *p, int64_t i, int64_t e, int64_t tile, int64_t end, float *hidden, float *out) {
    int64_t t = i / p->slots, f = tile;
    const float *z = p->z + (t * p->experts + e) * 2 * RANK;
    vec thin[RANK];
    for (int j = 0; j < RANK; j++) thin[j] = zero();
    for (; f + WIDTH * LANES <= end; f += WIDTH * LANES)
        forward_block(p, t, e, z, p->gate[i], f, WIDTH, hidden + f - tile, thin);
    for (; f < end; f += LANES) forward_block(p, t, e, z, p->gate[i], f, 1, hidden + f - tile, thin);
    add_sums(out + (t * p->experts + e) * RANK, thin, RANK);
}

/* hidden_out: [tokens, hidden]; thin: [tokens, experts, RANK], zeroed by the caller. */
int forward(int64_t tokens, int64_t experts, int64_t slots, int64_t hidden, int64_t first, int64_t last,
            const wide *pre, const int64_t *slot, const float *z, const float *gate, const float *in_v,
            const float *out_u, const float *scale, const float *bias, wide *hidden_out, float *thin) {
    problem p = {tokens, experts, slots, hidden, first, last, pre, z, slot, gate, in_v, out_u, scale, bias};
    schedule s;
    int status = schedule_slots(&p, &s);
    float sums[CHUNK][TILE] __attribute__((aligned(64)));
    for (int64_t tile = first; status == DONE && tile < last; tile += TILE) {
        int64_t end = tile + TILE < last ? tile + TILE : last;
        for (int64_t c = 0; c * CHUNK < tokens; c++) {
            memset(sums, 0, sizeof(sums));
            for (int64_t e = 0; e < experts; e++)
                for (int64_t j = s.begin[c * experts + e]; j < s.begin[c * experts + e + 1]; j++) {
                    const wide *ahead = pre + s.entry[j + AHEAD] / slots * 2 * hidden + tile;
                    prefetch(ahead, end - tile);
                    prefetch(ahead + hidden, end - tile);
                    forward_slot(&p, s.entry[j], e, tile, end, sums[s.entry[j] / slots - c * CHUNK], thin);
                }
            for (int64_t t = c * CHUNK; t < tokens && t < (c + 1) * CHUNK; t++)
                for (int64_t f = tile; f < end; f += LANES)
                    store(hidden_out + t * hidden + f, at(sums[t - c * CHUNK] + f - tile));
        }
    }
    discard(&s);
    return status;
}

/* What the backward pass adds to what it reads; the gradients of one expert's tensors have those tensors' layouts. */
typedef struct {
    const wide *d_hidden;  /* [tokens, hidden] */
    const float *d_thin;   /* [tokens, experts, RANK] */
    float *d_z, *d_gate, *d_in_v, *d_out_u, *d_scale, *d_bias;
} gradients;

/* Sums over the columns of one slot, kept as vectors until its tile is done. */
typedef struct { vec z[2 * RANK], gate; } slot_sums;

INLINE void backward_block(const problem *p, const gradients *d, int64_t t, int64_t e, float weight, int64_t f,
                           int width, float *d_g, float *d_u, slot_sums *sums) {
    const int64_t F = p->hidden;
    const float *z = p->z + (t * p->experts + e) * 2 * RANK, *dt = d->d_thin + (t * p->experts + e) * RANK;
    const float *vg = p->in_v + e * 2 * RANK * F + f, *vu = vg + RANK * F, *uo = p->out_u + e * RANK * F + f;
    float *d_vg = d->d_in_v + e * 2 * RANK * F + f, *d_vu = d_vg + RANK * F, *d_uo = d->d_out_u + e * RANK * F + f;
    vec g[WIDTH], u[WIDTH], q[WIDTH], h[WIDTH];
    projections(p, t, e, z, f, width, g, u);
    for (int w = 0; w < width; w++) q[w] = load(d->d_hidden + t * F + f + w * LANES);
    for (int i = 0; i < RANK; i++)
        for (int w = 0; w < width; w++) q[w] += dt[i] * at(uo + i * F + w * LANES);
    for (int w = 0; w < width; w++) { /* from here g, u hold their own gradients */
        vec s = sigmoid(g[w]), silu = g[w] * s, d_h = q[w] * weight;
        h[w] = silu * u[w];
        if (p->scale) {
            vec scale = at(p->scale + e * F + f + w * LANES);
            add_to(d->d_scale + e * F + f + w * LANES, d_h * h[w]);
            h[w] *= scale;
            d_h *= scale;
        }
        sums->gate += q[w] * h[w];
        h[w] *= weight;
        g[w] = d_h * u[w] * s * (1.0f + g[w] - silu);
        u[w] = d_h * silu;
        add_to(d_g + w * LANES, g[w]);
        add_to(d_u + w * LANES, u[w]);
        if (p->bias) {
            add_to(d->d_bias + e * 2 * F + f + w * LANES, g[w]);
            add_to(d->d_bias + (e * 2 + 1) * F + f + w * LANES, u[w]);
        }
    }
    for (int i = 0; i < RANK; i++) {
        vec z_g = zero() + z[i], z_u = zero() + z[RANK + i], d_t = zero() + dt[i];
        for (int w = 0; w < width; w++) {
            sums->z[i] += g[w] * at(vg + i * F + w * LANES);
            sums->z[RANK + i] += u[w] * at(vu + i * F + w * LANES);
            add_to(d_vg + i * F + w * LANES, z_g * g[w]);
            add_to(d_vu + i * F + w * LANES, z_u * u[w]);
            add_to(d_uo + i * F + w * LANES, d_t * h[w]);
        }
    }
}

static void backward_slot(const problem *p, const gradients *d, int64_t i, int64_t e, int64_t tile, int64_t end,
                          float *d_g, float *d_u) {
    int64_t t = i / p->slots, f = tile;
    slot_sums sums;
    memset(&sums, 0, sizeof(sums));
    for (; f + WIDTH * LANES <= end; f += WIDTH * LANES)
        backward_block(p, d, t, e, p->gate[i], f, WIDTH, d_g + f - tile, d_u + f - tile, &sums);
    for (; f < end; f += LANES) backward_block(p, d, t, e, p->gate[i], f, 1, d_g + f - tile, d_u + f - tile, &sums);
    add_sums(d->d_z + (t * p->experts + e) * 2 * RANK, sums.z, 2 * RANK);
    add_sums(d->d_gate + i, &sums.gate, 1);
}

/* d_pre: [tokens, 2 hidden]; all other outputs are added to what the caller zeroed. */
int backward(int64_t tokens, int64_t experts, int64_t slots, int64_t hidden, int64_t first, int64_t last,
             const wide *pre, const int64_t *slot, const float *z, const float *gate, const float *in_v,
             const float *out_u, const float *scale, const float *bias, const wide *d_hidden, const float *d_thin,
             wide *d_pre, float *d_z, float *d_gate, float *d_in_v, float *d_out_u, float *d_scale, float *d_bias) {
    problem p = {tokens, experts, slots, hidden, first, last, pre, z, slot, gate, in_v, out_u, scale, bias};
    gradients d = {d_hidden, d_thin, d_z, d_gate, d_in_v, d_out_u, d_scale, d_bias};
    schedule s;
    int status = schedule_slots(&p, &s);
    float d_g[CHUNK][TILE] __attribute__((aligned(64))), d_u[CHUNK][TILE] __attribute__((aligned(64)));
    for (int64_t tile = first; status == DONE && tile < last; tile += TILE) {
        int64_t end = tile + TILE < last ? tile + TILE : last;
        for (int64_t c = 0; c * CHUNK < tokens; c++) {
            memset(d_g, 0, sizeof(d_g));
            memset(d_u, 0, sizeof(d_u));
            for (int64_t e = 0; e < experts; e++)
                for (int64_t j = s.begin[c * experts + e]; j < s.begin[c * experts + e + 1]; j++) {
                    int64_t row = s.entry[j] / slots - c * CHUNK, ahead = s.entry[j + AHEAD] / slots;
                    prefetch(pre + ahead * 2 * hidden + tile, end - tile);
                    prefetch(pre + (ahead * 2 + 1) * hidden + tile, end - tile);
                    prefetch(d_hidden + ahead * hidden + tile, end - tile);
                    backward_slot(&p, &d, s.entry[j], e, tile, end, d_g[row], d_u[row]);
                }
            for (int64_t t = c * CHUNK; t < tokens && t < (c + 1) * CHUNK; t++)
                for (int64_t f = tile; f < end; f += LANES) {
                    store(d_pre + t * 2 * hidden + f, at(d_g[t - c * CHUNK] + f - tile));
                    store(d_pre + (t * 2 + 1) * hidden + f, at(d_u[t - c * CHUNK] + f - tile));
                }
        }
    }
    discard(&s);
    return status;
}
