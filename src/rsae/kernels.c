/* The sparse work of a training step on a CPU: choosing entries, sums over them, the rational gate on them.
 *
 * Rows, latents or blocks are shared among OpenMP's threads (torch's own: it is the same library); what comes out does not depend on
 * how many there are. Matrices are dense and row-major. Compiled by kernels.py where it runs.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef int64_t i64;

enum { LANES = 32, BLOCK = 256 };

/* Floats in a vector register. */
#if defined(__AVX512F__)
enum { WIDE = 16 };
#elif defined(__AVX__)
enum { WIDE = 8 };
#else
enum { WIDE = 4 };
#endif

static inline float widen(uint16_t bfloat16) {
    uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void relative(const uint16_t *h, const float *inverse, i64 n, float *out) {
    if (inverse)
        for (i64 j = 0; j < n; j++) out[j] = widen(h[j]) * inverse[j];
    else
        for (i64 j = 0; j < n; j++) out[j] = widen(h[j]);
}

/* Bit l: whether r[l] is above the limit, l < LANES. */
static inline uint32_t bits_above(const float *r, float limit) {
#ifdef __AVX512F__
    __m512 edge = _mm512_set1_ps(limit);
    uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(r), edge, _CMP_GT_OQ);
    return low | (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(r + 16), edge, _CMP_GT_OQ) << 16;
#else
    int any = 0;
    for (i64 lane = 0; lane < LANES; lane++) any |= r[lane] > limit;
    uint32_t bits = 0;
    for (i64 lane = 0; any && lane < LANES; lane++) bits |= (uint32_t)(r[lane] > limit) << lane;
    return bits;
#endif
}

/* Indices of the values above a limit; entries are few, so whole blocks are passed over. `found` has room for n + 1. */
static i64 find_above(const float *r, i64 n, float limit, i64 *found) {
    i64 m = 0, j = 0;
    for (; j + LANES <= n; j += LANES)
        for (uint32_t bits = bits_above(r + j, limit); bits; bits &= bits - 1) found[m++] = j + __builtin_ctz(bits);
    for (; j < n; j++) {
        found[m] = j;
        m += r[j] > limit;
    }
    return m;
}

/* Reorder so that a[k] is the (k+1)-th largest and nothing before it is smaller. */
static void select_largest(float *a, i64 n, i64 k) {
    i64 low = 0, high = n - 1;
    while (low < high) {
        float pivot = a[(low + high) / 2];
        i64 i = low, j = high;
        while (i <= j) {
            while (a[i] > pivot) i++;
            while (a[j] < pivot) j--;
            if (i <= j) {
                float swap = a[i];
                a[i++] = a[j];
                a[j--] = swap;
            }
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else return;
    }
}

/* The k-th and the (k+1)-th largest of a row, 0 < k < n. `guess` is a lower bound to try first; it only saves time. */
static void two_largest(const float *r, i64 n, i64 k, i64 *found, float *buffer, float *guess, float *kth, float *next) {
    i64 m;
    for (;;) {
        m = find_above(r, n, *guess, found);
        for (i64 i = 0; i < m; i++) buffer[i] = r[found[i]];
        if (m > k) break;
        *guess = *guess > 1e-30f ? 0.25f * *guess : -INFINITY;
        if (*guess == -INFINITY) {
            memcpy(buffer, r, n * sizeof(float));
            m = n;
            break;
        }
    }
    select_largest(buffer, m, k);
    *next = buffer[k];
    *kth = buffer[0];
    for (i64 j = 1; j < k; j++)
        if (buffer[j] < *kth) *kth = buffer[j];
    *guess = *next > 0 && *next < INFINITY ? 0.8f * *next : 0.0f;
}

/* For each row: the scale s (midpoint of the k-th and (k+1)-th largest relative value, or 1 where k is 0), the edge lowest * s^alpha,
 * and how many relative values are above it. With `exact` the edge is the k-th largest and k entries count. */
void count_entries(i64 size, i64 n, const uint16_t *h, const float *inverse, i64 k, float alpha, float lowest, i64 exact,
                   float smallest, float *scale, float *edge, i64 *count) {
#pragma omp parallel
  {
    float *r = malloc(2 * n * sizeof(float)), *buffer = r + n, guess = 0.0f;
    i64 *found = malloc((n + 1) * sizeof(i64));
#pragma omp for schedule(static)
    for (i64 row = 0; row < size; row++) {
        relative(h + row * n, inverse, n, r);
        float s = 1.0f, kth = 0.0f, next = 0.0f;
        if (k > 0) {
            if (k < n) two_largest(r, n, k, found, buffer, &guess, &kth, &next);
            s = k < n ? 0.5f * (kth + next) : 0.0f;
            if (!(s > smallest)) s = smallest;
        }
        scale[row] = s;
        if (exact) {
            edge[row] = k < n ? kth : -INFINITY;
            count[row] = k;
            continue;
        }
        float limit = lowest * (k > 0 && alpha != 0.0f ? (alpha == 1.0f ? s : powf(s, alpha)) : 1.0f);
        i64 m = 0;
        for (i64 j = 0; j < n; j++) m += r[j] > limit;
        edge[row] = limit;
        count[row] = m;
    }
    free(r);
    free(found);
  }
}

/* The entries that count_entries counted: their latents, their h, their rows. With `exact`, ties at the edge go to the first. */
void fill_entries(i64 size, i64 n, const uint16_t *h, const float *inverse, i64 exact, const float *edge, const i64 *offset,
                  const i64 *count, i64 *latents, i64 *rows, float *values) {
#pragma omp parallel
  {
    float *r = malloc(n * sizeof(float));
    i64 *found = malloc((n + 1) * sizeof(i64));
#pragma omp for schedule(static)
    for (i64 row = 0; row < size; row++) {
        relative(h + row * n, inverse, n, r);
        float limit = edge[row];
        i64 m = find_above(r, n, limit, found), at = offset[row];
        if (exact && m < count[row]) {
            i64 ties = count[row] - m;
            m = 0;
            for (i64 j = 0; j < n; j++) {
                int tie = r[j] == limit && ties > 0;
                ties -= tie;
                found[m] = j;
                m += tie || r[j] > limit;
            }
        }
        for (; m < count[row]; m++) found[m] = m; /* a row with nan, which is no larger than anything */
        for (i64 e = 0; e < count[row]; e++) {
            latents[at + e] = found[e];
            rows[at + e] = row;
            values[at + e] = widen(h[row * n + found[e]]);
        }
    }
    free(r);
    free(found);
  }
}

/* out[g] = sum over the entries of group g of weight * vectors[index], in their order; `order` NULL for 0, 1, 2, ... */
void sum_groups(i64 size, i64 d, const i64 *offset, i64 n_groups, i64 n_entries, const i64 *order, const i64 *index,
                const float *weight, const float *vectors, float *out) {
#pragma omp parallel for schedule(static)
    for (i64 group = 0; group < size; group++) {
        float *sum = out + group * d;
        i64 last = group + 1 < n_groups ? offset[group + 1] : n_entries;
        memset(sum, 0, d * sizeof(float));
        for (i64 e = offset[group]; e < last; e++) {
            i64 entry = order ? order[e] : e;
            float w = weight[entry];
            if (w == 0.0f) continue; /* near its edge, but not active */
            const float *vector = vectors + index[entry] * d;
            for (i64 i = 0; i < d; i++) sum[i] += w * vector[i];
        }
    }
}

/* out[e] = <a[row of e], b[latent of e]>, in 16 partial sums. */
void dot_entries(i64 size, i64 d, const i64 *offset, i64 n_rows, i64 n_entries, const i64 *latents, const float *a,
                 const float *b, float *out) {
#pragma omp parallel for schedule(static)
    for (i64 row = 0; row < size; row++) {
        const float *x = a + row * d;
        i64 last = row + 1 < n_rows ? offset[row + 1] : n_entries;
        for (i64 e = offset[row]; e < last; e++) {
            const float *y = b + latents[e] * d;
            float partial[16] = {0}, total = 0.0f;
            i64 i = 0;
            for (; i + 16 <= d; i += 16)
                for (i64 lane = 0; lane < 16; lane++) partial[lane] += x[i + lane] * y[i + lane];
            for (; i < d; i++) total += x[i] * y[i];
            for (i64 lane = 0; lane < 16; lane++) total += partial[lane];
            out[e] = total;
        }
    }
}

/* order: the entries sorted by key, those of a key as they come. `next` holds where each key begins, and is used up. */
void sort_by_key(i64 n, const i64 *key, i64 *next, i64 *order) {
    for (i64 e = 0; e < n; e++) order[next[key[e]]++] = e;
}

/* The rational gate (rational.py), in blocks of BLOCK, WIDE elements at a time. In C_in and C_out a step of 0 is one for all, 1 one
 * each. */
typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef int32_t mask __attribute__((vector_size(4 * WIDE)));

static inline wide pick(mask where, wide a, wide b) { return (wide)((where & (mask)a) | (~where & (mask)b)); }
static inline wide all(float value) { return value - (wide){0}; }
static inline wide clamp(wide t) { return pick(t < -1.0f, all(-1.0f), pick(t > 1.0f, all(1.0f), t)); }
static inline wide positive(wide t) { return pick(t < 0.0f, all(0.0f), t); }
static inline wide absolute(wide t) { return (wide)((mask)t & 0x7fffffff); }

/* WIDE of `from` (step 1), of which there are m and then `pad`, or WIDE times its only value (step 0). */
static inline wide load(const float *from, i64 step, i64 first, i64 m, float pad) {
    if (!step) return all(*from);
    wide out = all(pad);
    memcpy(&out, from + first, (m < WIDE ? m : WIDE) * sizeof(float));
    return out;
}

static inline void store(wide value, i64 first, i64 m, float *into) {
    memcpy(into + first, &value, (m < WIDE ? m : WIDE) * sizeof(float));
}

static inline wide horner(const float *coeffs, i64 n, wide u) {
    wide value = all(coeffs[n - 1]);
    for (i64 c = n - 2; c >= 0; c--) value = value * u + coeffs[c];
    return value;
}

static double total_of(wide value) {
    double total = 0.0;
    for (i64 lane = 0; lane < WIDE; lane++) total += value[lane];
    return total;
}

void rational_forward(i64 size, i64 total, const float *h, const float *C_in, i64 step_in, const float *C_out, i64 step_out,
                      const float *num, i64 n_num, const float *den, i64 n_den, float centre, float scale, float *out) {
    float narrower = 1.0f / scale;
#pragma omp parallel for schedule(static)
    for (i64 block = 0; block < size; block++) {
        i64 last = (block + 1) * BLOCK < total ? (block + 1) * BLOCK : total;
        for (i64 e = block * BLOCK; e < last; e += WIDE) {
            wide x = load(h, 1, e, last - e, 0.0f);
            wide in = load(C_in, step_in, e, last - e, 1.0f), by = load(C_out, step_out, e, last - e, 1.0f);
            wide u = (clamp(x / in) - centre) * narrower;
            wide r = horner(num, n_num, u) / (1.0f + absolute(horner(den, n_den, u)));
            store(r * by + positive(x - in) * (by / in), e, last - e, out);
        }
    }
}

/* Gradient in h for each element; those of the coefficients for each block, (blocks, n_num) and (blocks, n_den), and so are those
 * of C_in and C_out that are one for all; of the others for each element. */
void rational_backward(i64 size, i64 total, const float *h, const float *grad, const float *C_in, i64 step_in,
                       const float *C_out, i64 step_out, const float *num, const float *num_prime, i64 n_num, const float *den,
                       const float *den_prime, i64 n_den, float centre, float scale, float *d_h, float *d_C_in, float *d_C_out,
                       double *d_num, double *d_den, double *sum_in, double *sum_out) {
    float narrower = 1.0f / scale;
#pragma omp parallel for schedule(static)
    for (i64 block = 0; block < size; block++) {
        i64 last = (block + 1) * BLOCK < total ? (block + 1) * BLOCK : total;
        wide sums[n_num + n_den], all_in = {0}, all_out = {0};
        for (i64 c = 0; c < n_num + n_den; c++) sums[c] = all(0.0f);
        for (i64 e = block * BLOCK; e < last; e += WIDE) {
            wide x = load(h, 1, e, last - e, 0.0f), g = load(grad, 1, e, last - e, 0.0f);
            wide in = load(C_in, step_in, e, last - e, 1.0f), by = load(C_out, step_out, e, last - e, 1.0f);
            wide t = x / in, u = (clamp(t) - centre) * narrower;
            wide A = horner(den, n_den, u), A1 = horner(den_prime, n_den > 1 ? n_den - 1 : 1, u);
            wide P1 = horner(num_prime, n_num > 1 ? n_num - 1 : 1, u);
            wide of_Q = 1.0f / (1.0f + absolute(A)), r = horner(num, n_num, u) * of_Q;
            wide sign = pick(A > 0.0f, all(1.0f), pick(A < 0.0f, all(-1.0f), all(0.0f)));
            wide slope = (P1 - r * sign * A1) * of_Q * narrower;
            slope = pick(t > 1.0f, all(1.0f), pick(t > -1.0f, slope, all(0.0f)));
            wide d = g * (by / in) * slope, w = g * by * of_Q, v = -w * r * sign;
            wide d_in = -d * t, d_out = g * (r + positive(t - 1.0f));
            store(d, e, last - e, d_h);
            if (step_in)
                store(d_in, e, last - e, d_C_in);
            else
                all_in += d_in;
            if (step_out)
                store(d_out, e, last - e, d_C_out);
            else
                all_out += d_out;
            for (i64 c = 0; c < n_num; c++) {
                sums[c] += w;
                w *= u;
            }
            for (i64 c = 0; c < n_den; c++) {
                sums[n_num + c] += v;
                v *= u;
            }
        }
        for (i64 c = 0; c < n_num; c++) d_num[block * n_num + c] = total_of(sums[c]);
        for (i64 c = 0; c < n_den; c++) d_den[block * n_den + c] = total_of(sums[n_num + c]);
        sum_in[block] = total_of(all_in);
        sum_out[block] = total_of(all_out);
    }
}
