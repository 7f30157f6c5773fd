/* The sparse work of a training step on a CPU: choosing entries, sums over them, the rational gate on them.
 *
 * Rows, latents or blocks are shared among OpenMP's threads (torch's own: it is the same library); what comes out does not depend on
 * how many there are. Matrices are dense and row-major. Compiled by kernels.py where it runs.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

enum { LANES = 32, BLOCK = 256 };

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

/* Indices of the values above a limit; entries are few, so whole blocks are passed over. `found` has room for n + 1. */
static i64 find_above(const float *r, i64 n, float limit, i64 *found) {
    i64 m = 0, j = 0;
    for (; j + LANES <= n; j += LANES) {
        int any = 0;
        for (i64 lane = 0; lane < LANES; lane++) any |= r[j + lane] > limit;
        if (!any) continue;
        for (i64 i = j; i < j + LANES; i++) {
            found[m] = i;
            m += r[i] > limit;
        }
    }
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
    *guess = *next > 0 ? 0.8f * *next : 0.0f;
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

/* The rational gate (rational.py), in blocks of BLOCK; steps of 0 or 1 in C_in and C_out: one for all, or one each. */
static void horner(const float *coeffs, i64 n, const float *u, i64 m, float *out) {
    for (i64 e = 0; e < m; e++) out[e] = n > 0 ? coeffs[n - 1] : 0.0f;
    for (i64 c = n - 2; c >= 0; c--)
        for (i64 e = 0; e < m; e++) out[e] = out[e] * u[e] + coeffs[c];
}

/* out[c] = sum of w u^c, c = 0 ... n - 1; w is used up. */
static void power_sums(float *w, const float *u, i64 m, i64 n, double *out) {
    for (i64 c = 0; c < n; c++) {
        double sum = 0.0;
        for (i64 e = 0; e < m; e++) {
            sum += w[e];
            w[e] *= u[e];
        }
        out[c] = sum;
    }
}

void rational_forward(i64 size, i64 total, const float *h, const float *C_in, i64 step_in, const float *C_out, i64 step_out,
                      const float *num, i64 n_num, const float *den, i64 n_den, float centre, float scale, float *out) {
#pragma omp parallel for schedule(static)
    for (i64 block = 0; block < size; block++) {
        float u[BLOCK], P[BLOCK], A[BLOCK];
        i64 first = block * BLOCK, m = total - first < BLOCK ? total - first : BLOCK;
        for (i64 e = 0; e < m; e++) {
            float t = h[first + e] / C_in[step_in * (first + e)];
            t = t < -1.0f ? -1.0f : t > 1.0f ? 1.0f : t;
            u[e] = (t - centre) / scale;
        }
        horner(num, n_num, u, m, P);
        horner(den, n_den, u, m, A);
        for (i64 e = 0; e < m; e++) {
            float in = C_in[step_in * (first + e)], by = C_out[step_out * (first + e)], beyond = h[first + e] - in;
            beyond = beyond > 0.0f ? beyond : 0.0f;
            out[first + e] = P[e] / (1.0f + fabsf(A[e])) * by + beyond * (by / in);
        }
    }
}

/* Gradients in h, C_in and C_out for each element; those of the coefficients for each block, (blocks, n_num) and (blocks, n_den). */
void rational_backward(i64 size, i64 total, const float *h, const float *grad, const float *C_in, i64 step_in,
                       const float *C_out, i64 step_out, const float *num, const float *num_prime, i64 n_num, const float *den,
                       const float *den_prime, i64 n_den, float centre, float scale, float *d_h, float *d_C_in, float *d_C_out,
                       double *d_num, double *d_den) {
#pragma omp parallel for schedule(static)
    for (i64 block = 0; block < size; block++) {
        float u[BLOCK], t[BLOCK], P[BLOCK], A[BLOCK], P1[BLOCK], A1[BLOCK], w[BLOCK], v[BLOCK];
        i64 first = block * BLOCK, m = total - first < BLOCK ? total - first : BLOCK;
        for (i64 e = 0; e < m; e++) {
            t[e] = h[first + e] / C_in[step_in * (first + e)];
            float clamped = t[e] < -1.0f ? -1.0f : t[e] > 1.0f ? 1.0f : t[e];
            u[e] = (clamped - centre) / scale;
        }
        horner(num, n_num, u, m, P);
        horner(den, n_den, u, m, A);
        horner(num_prime, n_num > 1 ? n_num - 1 : 1, u, m, P1);
        horner(den_prime, n_den > 1 ? n_den - 1 : 1, u, m, A1);
        for (i64 e = 0; e < m; e++) {
            float in = C_in[step_in * (first + e)], by = C_out[step_out * (first + e)], g = grad[first + e];
            float sign = (float)((A[e] > 0.0f) - (A[e] < 0.0f)), Q = 1.0f + fabsf(A[e]), r = P[e] / Q;
            float slope = (P1[e] - r * sign * A1[e]) / Q / scale;
            slope = t[e] > 1.0f ? 1.0f : t[e] > -1.0f ? slope : 0.0f;
            float through = g * (by / in) * slope, beyond = t[e] - 1.0f;
            d_h[first + e] = through;
            d_C_in[first + e] = -through * t[e];
            d_C_out[first + e] = g * (r + (beyond > 0.0f ? beyond : 0.0f));
            w[e] = g * by / Q;
            v[e] = -w[e] * r * sign;
        }
        power_sums(w, u, m, n_num, d_num + block * n_num);
        power_sums(v, u, m, n_den, d_den + block * n_den);
    }
}
