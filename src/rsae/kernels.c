/* The sparse work of a training step on a CPU: choosing entries, sums over them, the rational gate on them.
 *
 * Rows, latents or blocks are shared among OpenMP's threads (torch's own: it is the same library); what comes out does not depend on
 * how many there are. Matrices are dense and row-major. Compiled by kernels.py where it runs.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

typedef int64_t i64;

/* Values of a mask; entries written of each, there or not; keys, and elements of the rational gate, at a time. */
enum { LANES = 64, SOME = 3, PADDED = 16, BLOCK = 256 };

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

/* Bit l: whether r[l] is above the limit, l < LANES. */
static inline uint64_t bits_above(const float *r, float limit) {
    uint64_t bits = 0;
#if defined(__AVX512F__)
    for (int l = 0; l < LANES; l += 16)
        bits |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(r + l), _mm512_set1_ps(limit), _CMP_GT_OQ) << l;
#elif defined(__AVX__)
    for (int l = 0; l < LANES; l += 8)
        bits |= (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(r + l), _mm256_set1_ps(limit), _CMP_GT_OQ)) << l;
#else
    int any = 0;
    for (int l = 0; l < LANES; l++) any |= r[l] > limit;
    for (int l = 0; any && l < LANES; l++) bits |= (uint64_t)(r[l] > limit) << l;
#endif
    return bits;
}

/* What a gate compares: h, or h times the inverse of its latent's threshold. */
static inline float relative(const uint16_t *h, const float *inverse, i64 j) {
    return inverse ? widen(h[j]) * inverse[j] : widen(h[j]);
}

/* The relative values of a row that are above a limit, and where they stand. Both have room for n + SOME. */
static inline i64 above(const uint16_t *h, const float *inverse, i64 n, float limit, int32_t *found, float *values) {
    i64 m = 0, j = 0;
    for (; j + LANES <= n; j += LANES) {
        float r[LANES];
        for (i64 lane = 0; lane < LANES; lane++) r[lane] = relative(h, inverse, j + lane);
        uint64_t bits = bits_above(r, limit);
        i64 here = __builtin_popcountll(bits);
        /* SOME, whether they are there or not: a branch would be guessed wrong more often than there are more */
        for (i64 e = 0; e < SOME || e < here; e++, bits &= bits - 1)
            found[m + e] = (int32_t)j + __builtin_ctzll(bits | 1ull << (LANES - 1));
        m += here;
    }
    for (; j < n; j++) {
        found[m] = (int32_t)j;
        m += relative(h, inverse, j) > limit;
    }
    for (i64 i = 0; i < m; i++) values[i] = relative(h, inverse, found[i]);
    return m;
}

static i64 find_above(const uint16_t *h, const float *inverse, i64 n, float limit, int32_t *found, float *values) {
    return inverse ? above(h, inverse, n, limit, found, values) : above(h, NULL, n, limit, found, values);
}

/* The values above a limit that `find_above` listed are kept, in their order. */
static i64 keep_above(i64 m, float limit, int32_t *found, float *values) {
    i64 kept = 0;
    for (i64 i = 0; i < m; i++) {
        found[kept] = found[i];
        values[kept] = values[i];
        kept += values[i] > limit;
    }
    return kept;
}

/* The bits of a float as an integer that is ordered as the floats are; and back, being its own inverse. */
static inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

/* How many of n keys reach a limit; n is a multiple of PADDED. */
static inline i64 n_reaching(const int32_t *key, i64 n, int32_t limit) {
    i64 reaching = 0;
#ifdef __AVX512F__
    for (i64 i = 0; i < n; i += PADDED)
        reaching += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(key + i), _mm512_set1_epi32(limit)));
#else
    int32_t found = 0;
    for (i64 i = 0; i < n; i++) found += key[i] >= limit;
    reaching = found;
#endif
    return reaching;
}

/* The k-th and the (k+1)-th largest of n values, 0 < k < n; nan comes last. `key` has room for n + PADDED.
 * Bit by bit, from the first that not all have alike: the largest integer that at least k keys reach, or one that parts k of them from
 * the others. Every key is looked at each time, since a branch that is guessed wrong costs more than a register of comparisons. */
static void kth_largest(const float *values, i64 n, i64 k, int32_t *key, float *kth, float *next) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (i64 i = 0; i < n; i++) {
        float value = values[i] == values[i] ? values[i] : -INFINITY;
        memcpy(key + i, &value, 4);
        key[i] = ordered(key[i]);
        low = key[i] < low ? key[i] : low;
        high = key[i] > high ? key[i] : high;
    }
    i64 padded = (n + PADDED - 1) / PADDED * PADDED;
    for (i64 i = n; i < padded; i++) key[i] = INT32_MIN; /* below all: -inf is above it */
    int first = low == high ? -1 : 31 - __builtin_clz((uint32_t)low ^ (uint32_t)high);
    int32_t limit = first == 31 ? INT32_MIN : (int32_t)((uint32_t)low >> (first + 1) << (first + 1));
    i64 reaching = n;
    for (int bit = first; bit >= 0 && reaching > k; bit--) {
        int32_t tried = (int32_t)((uint32_t)limit + (1u << bit));
        i64 found = n_reaching(key, padded, tried);
        if (found >= k) {
            limit = tried;
            reaching = found;
        }
    }
    int32_t least = INT32_MAX, below = INT32_MIN;
    for (i64 i = 0; i < n; i++) {
        least = key[i] >= limit && key[i] < least ? key[i] : least;
        below = key[i] < limit && key[i] > below ? key[i] : below;
    }
    int32_t bits[2] = {ordered(least), ordered(reaching > k ? least : below)};
    memcpy(kth, bits, 4);
    memcpy(next, bits + 1, 4);
}

/* The k-th and the (k+1)-th largest of a row, 0 < k < n. `guess` is a lower bound to try first, and only saves time. Returns how many
 * values `found` and `values` list: those above `*listed`. `values` has room for n more behind these. */
static i64 two_largest(const uint16_t *h, const float *inverse, i64 n, i64 k, int32_t *found, float *values, int32_t *key,
                       float *guess, float *listed, float *kth, float *next) {
    i64 m = find_above(h, inverse, n, *guess, found, values);
    while (m <= k && *guess != -INFINITY) {
        *guess = *guess > 1e-30f ? 0.25f * *guess : -INFINITY;
        m = find_above(h, inverse, n, *guess, found, values);
    }
    *listed = *guess;
    if (m > k) {
        kth_largest(values, m, k, key, kth, next);
    } else { /* -inf or nan is among them */
        float *all = values + n + SOME;
        for (i64 j = 0; j < n; j++) all[j] = relative(h, inverse, j);
        kth_largest(all, n, k, key, kth, next);
    }
    return m;
}

/* The k largest of a row, of equal ones the first: of the m that `found` and `values` list, if the k-th is among them, or else of all. */
static void keep_largest(const uint16_t *h, const float *inverse, i64 n, i64 k, float kth, i64 m, i64 is_listed, int32_t *found,
                         const float *values) {
    i64 larger = 0, kept = 0, all = is_listed ? m : n;
    for (i64 i = 0; i < all; i++) larger += (is_listed ? values[i] : relative(h, inverse, i)) > kth;
    for (i64 i = 0, ties = k - larger; i < all && kept < k; i++) {
        float r = is_listed ? values[i] : relative(h, inverse, i);
        int tie = r == kth && ties > 0;
        ties -= tie;
        found[kept] = is_listed ? found[i] : (int32_t)i;
        kept += tie || r > kth;
    }
    for (; kept < k; kept++) found[kept] = (int32_t)kept; /* a row with nan, which is no larger than anything */
}

/* For each row: the scale s (`given`, or the midpoint of the k-th and (k+1)-th largest relative value, or 1 where k is 0), the edge
 * lowest * s^alpha, and how many relative values are above it. With `exact` the edge is the k-th largest and k entries count. Of a row with
 * no more than `room` entries their latents are listed, and their h is in `near`; with `exact` there is room for k. */
void count_entries(i64 size, i64 n, const uint16_t *h, const float *inverse, i64 k, float alpha, float lowest, i64 exact,
                   float smallest, const float *given, float *scale, float *edge, i64 *count, i64 room, int32_t *latents,
                   uint16_t *near) {
#pragma omp parallel
  {
    float *values = malloc((2 * n + SOME) * sizeof(float)), guess = 0.0f;
    int32_t *found = malloc((n + SOME) * sizeof(int32_t)), *key = malloc((n + PADDED) * sizeof(int32_t));
#pragma omp for schedule(static)
    for (i64 row = 0; row < size; row++) {
        const uint16_t *here = h + row * n;
        float s = 1.0f, kth = -INFINITY, next = 0.0f, listed = INFINITY;
        i64 m = 0;
        if (given) {
            s = given[row];
        } else if (k > 0) {
            if (k < n) m = two_largest(here, inverse, n, k, found, values, key, &guess, &listed, &kth, &next);
            s = k < n ? 0.5f * (kth + next) : 0.0f;
            if (!(s > smallest)) s = smallest;
        }
        float limit = exact ? kth : lowest * (k > 0 && alpha != 0.0f ? (alpha == 1.0f ? s : powf(s, alpha)) : 1.0f);
        if (exact) {
            keep_largest(here, inverse, n, k, kth, m, kth > listed, found, values);
            m = k;
        } else if (limit >= listed)
            m = keep_above(m, limit, found, values);
        else
            m = find_above(here, inverse, n, limit, found, values);
        scale[row] = s;
        edge[row] = limit;
        count[row] = m;
        for (i64 e = 0; m <= room && e < m; e++) {
            latents[row * room + e] = found[e];
            near[row * room + e] = here[found[e]];
        }
        /* So low that the next row's list, too, reaches down to both */
        guess = next > 0 && next < INFINITY ? 0.8f * next : 0.0f;
        if (!exact && limit > 0 && limit < guess) guess = limit;
    }
    free(values);
    free(found);
    free(key);
  }
}

/* The entries that count_entries counted, of one row behind those of the other: their latents, their rows, their h. */
void fill_entries(i64 size, i64 n, const uint16_t *h, const float *inverse, const float *edge, const i64 *offset,
                  const i64 *count, i64 room, const int32_t *listed, const uint16_t *near, i64 *latents, i64 *rows, float *values) {
#pragma omp parallel
  {
    float *unused = malloc((n + SOME) * sizeof(float));
    int32_t *again = malloc((n + SOME) * sizeof(int32_t));
#pragma omp for schedule(static)
    for (i64 row = 0; row < size; row++) {
        const uint16_t *here = h + row * n;
        i64 is_listed = count[row] <= room, at = offset[row];
        if (!is_listed) find_above(here, inverse, n, edge[row], again, unused);
        for (i64 e = 0; e < count[row]; e++, at++) {
            latents[at] = is_listed ? listed[row * room + e] : again[e];
            rows[at] = row;
            values[at] = widen(is_listed ? near[row * room + e] : here[again[e]]);
        }
    }
    free(unused);
    free(again);
  }
}

/* A register of floats, wherever in a row they begin. */
typedef float line __attribute__((vector_size(4 * WIDE), aligned(4)));
enum { LINE = WIDE, MOST = 8, FEW = 4 };

/* Sum over entries of their weight times some lines of their vectors. */
static inline void sum_lines(int lines, i64 first, i64 last, const i64 *from, const float *by, const float *vectors, float *sum) {
    line sums[MOST] = {{0}};
    for (i64 e = first; e < last; e++)
        for (int c = 0; c < lines; c++) sums[c] += by[e] * *(const line *)(vectors + from[e] + c * LINE);
    memcpy(sum, sums, lines * sizeof(line));
}

/* out[g] = sum over the entries of group g of weight * vectors[index], in their order; `order` NULL for 0, 1, 2, ... As many columns
 * at a time as registers can hold. */
void sum_groups(i64 size, i64 d, const i64 *offset, i64 n_groups, i64 n_entries, const i64 *order, const i64 *index,
                const float *weight, const float *vectors, float *out) {
    i64 *from = malloc((n_entries + size) * sizeof(i64)), *last = from + n_entries;
    float *by = malloc(n_entries * sizeof(float));
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (i64 group = 0; group < size; group++) {
        i64 first = offset[group], end = group + 1 < n_groups ? offset[group + 1] : n_entries, at = first;
        for (i64 e = first; e < end; e++) {
            i64 entry = order ? order[e] : e;
            from[at] = index[entry] * d;
            by[at] = weight[entry];
            at += by[at] != 0.0f; /* else it is near its edge, but not active */
        }
        last[group] = at;
    }
    for (i64 column = 0, width; column < d; column += width) {
        i64 left = (d - column) / LINE, lines = left >= MOST ? MOST : left >= 4 ? 4 : left >= 2 ? 2 : left;
        width = lines ? lines * LINE : d - column;
#pragma omp for schedule(static) nowait
        for (i64 group = 0; group < size; group++) {
            i64 first = offset[group], end = last[group];
            const float *part = vectors + column;
            float *sum = out + group * d + column;
            if (lines == MOST) sum_lines(MOST, first, end, from, by, part, sum);
            else if (lines == 4) sum_lines(4, first, end, from, by, part, sum);
            else if (lines == 2) sum_lines(2, first, end, from, by, part, sum);
            else if (lines == 1) sum_lines(1, first, end, from, by, part, sum);
            else {
                memset(sum, 0, width * sizeof(float));
                for (i64 e = first; e < end; e++)
                    for (i64 i = 0; i < width; i++) sum[i] += by[e] * part[from[e] + i];
            }
        }
    }
  }
    free(from);
    free(by);
}

/* The sum of a line, halved again and again. */
static inline float total_of_line(line a) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)a); /* the same sums, which gcc would take out one by one */
#else
    for (int half = LINE / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) a[lane] += a[lane + half];
    return a[0];
#endif
}

/* out[e] = <a[row of e], b[latent of e]>. */
void dot_entries(i64 size, i64 d, const i64 *offset, i64 n_rows, i64 n_entries, const i64 *latents, const float *a,
                 const float *b, float *out) {
    i64 whole = d / LINE * LINE;
#pragma omp parallel for schedule(static)
    for (i64 row = 0; row < size; row++) {
        const float *x = a + row * d;
        i64 end = row + 1 < n_rows ? offset[row + 1] : n_entries;
        for (i64 first = offset[row]; first < end; first += FEW) {
            const float *y[FEW];
            line products[FEW] = {{0}};
            for (int c = 0; c < FEW; c++) y[c] = b + latents[first + c < end ? first + c : end - 1] * d;
            for (i64 i = 0; i < whole; i += LINE)
                for (int c = 0; c < FEW; c++) products[c] += *(const line *)(x + i) * *(const line *)(y[c] + i);
            for (int c = 0; c < FEW && first + c < end; c++) {
                float rest = 0.0f;
                for (i64 i = whole; i < d; i++) rest += x[i] * y[c][i];
                out[first + c] = total_of_line(products[c]) + rest;
            }
        }
    }
}

/* The two gradients of a decoder, each row fetched once for both: sum[latent] = sum over its entries of weight * a[row], as sum_groups
 * has it, and for each entry out[e] = <a[row], b[latent]>, as dot_entries has it. FEW rows at a time, as they lie: fewer would load and store the sums more
 * often than the rows. */
void sum_and_dots(i64 size, i64 d, const i64 *offset, i64 n_entries, const i64 *order, const i64 *rows,
                  const float *weight, const float *a, const float *b, float *sum, float *out) {
    i64 whole = d / LINE * LINE;
#pragma omp parallel for schedule(dynamic, 64)
    for (i64 latent = 0; latent < size; latent++) {
        const float *y = b + latent * d;
        float *into = sum + latent * d;
        i64 end = latent + 1 < size ? offset[latent + 1] : n_entries;
        memset(into, 0, d * sizeof(float));
        for (i64 first = offset[latent]; first < end; first += FEW) {
            const float *x[FEW];
            float by[FEW];
            line products[FEW] = {{0}};
            for (int c = 0; c < FEW; c++) { /* the last row again, times 0, where there are no more */
                i64 e = order[first + c < end ? first + c : end - 1];
                x[c] = a + rows[e] * d;
                by[c] = first + c < end ? weight[e] : 0.0f;
            }
            for (i64 i = 0; i < whole; i += LINE) {
                line total = *(line *)(into + i), other = *(const line *)(y + i);
                for (int c = 0; c < FEW; c++) {
                    line part = *(const line *)(x[c] + i);
                    total += by[c] * part;
                    products[c] += part * other;
                }
                *(line *)(into + i) = total;
            }
            for (int c = 0; c < FEW && first + c < end; c++) {
                float rest = 0.0f;
                for (i64 i = whole; i < d; i++) {
                    into[i] += by[c] * x[c][i];
                    rest += x[c][i] * y[i];
                }
                out[order[first + c]] = total_of_line(products[c]) + rest;
            }
        }
    }
}

/* offset: where each key begins when the entries are sorted by key; order: the entries so sorted, those of a key as they come. */
void sort_by_key(i64 n, i64 n_keys, const i64 *key, i64 *offset, i64 *order) {
    memset(offset, 0, n_keys * sizeof(i64));
    for (i64 e = 0; e < n; e++) offset[key[e]]++;
    for (i64 k = 0, first = 0; k < n_keys; k++) {
        i64 count = offset[k];
        offset[k] = first;
        first += count;
    }
    for (i64 e = 0; e < n; e++) order[offset[key[e]]++] = e; /* now each is where the next key begins */
    memmove(offset + 1, offset, (n_keys - 1) * sizeof(i64));
    offset[0] = 0;
}

/* Each row of a matrix to its norm, in place. */
void rescale_rows(i64 size, i64 d, float *rows, const float *norms) {
#pragma omp parallel for schedule(static)
    for (i64 row = 0; row < size; row++) {
        float *here = rows + row * d, rest = 0.0f;
        line partial[4] = {{0}};
        i64 i = 0;
        for (; i + 4 * LINE <= d; i += 4 * LINE)
            for (int c = 0; c < 4; c++) partial[c] += *(line *)(here + i + c * LINE) * *(line *)(here + i + c * LINE);
        for (; i < d; i++) rest += here[i] * here[i];
        float norm = sqrtf(total_of_line((partial[0] + partial[1]) + (partial[2] + partial[3])) + rest);
        float by = norms[row] / (norm < 1e-8f ? 1e-8f : norm);
        for (i = 0; i < d; i++) here[i] *= by;
    }
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
    if (m >= WIDE) memcpy(&out, from + first, sizeof(wide)); /* one instruction: of a size that is known */
    else memcpy(&out, from + first, m * sizeof(float));
    return out;
}

static inline void store(wide value, i64 first, i64 m, float *into) {
    if (m >= WIDE) memcpy(into + first, &value, sizeof(wide));
    else memcpy(into + first, &value, m * sizeof(float));
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

/* The surrogate gradient of a hard edge (rational.py). */
typedef uint8_t bytes __attribute__((vector_size(WIDE)));

static inline mask load_mask(const uint8_t *from, i64 first, i64 m) {
    bytes given = {0};
    if (m >= WIDE) memcpy(&given, from + first, WIDE);
    else memcpy(&given, from + first, m);
    return -__builtin_convertvector(given, mask);
}

static inline mask is_near(wide h, wide threshold, float bandwidth) { return absolute(h - threshold) < 0.5f * (bandwidth * threshold); }

/* gain: L_on - L_off of each entry in the window, 0 outside; without a curvature to first order. For each block the sums of it and of
 * the weights (NULL: 1) in the window. */
void edge_gain(i64 size, i64 total, const float *amplitude, const float *h, const float *threshold, const uint8_t *on,
               const float *grad, const float *curvature, const float *weight, float bandwidth, float *gain, double *sums) {
#pragma omp parallel for schedule(static)
    for (i64 block = 0; block < size; block++) {
        i64 last = (block + 1) * BLOCK < total ? (block + 1) * BLOCK : total;
        wide gains = {0}, weights = {0};
        for (i64 e = block * BLOCK; e < last; e += WIDE) {
            wide a = load(amplitude, 1, e, last - e, 0.0f), jump = a * load(grad, 1, e, last - e, 0.0f);
            mask near = is_near(load(h, 1, e, last - e, INFINITY), load(threshold, 1, e, last - e, 1.0f), bandwidth);
            if (curvature) {
                wide second = load(curvature, 1, e, last - e, 0.0f) * (a * a);
                jump += pick(load_mask(on, e, last - e), -second, second);
            }
            jump = pick(near, jump, all(0.0f));
            gains += jump;
            weights += pick(near, weight ? load(weight, 1, e, last - e, 0.0f) : all(1.0f), all(0.0f));
            store(jump, e, last - e, gain);
        }
        sums[2 * block] = total_of(gains);
        sums[2 * block + 1] = total_of(weights);
    }
}

/* The gradients in amplitude, h (NULL: none) and threshold, given the gain and what an active latent of weight 1 costs. */
void edge_backward(i64 size, i64 total, const float *gain, const float *h, const float *threshold, const uint8_t *on,
                   const float *grad, const float *weight, const float *price, float bandwidth, float strength, float *d_amplitude,
                   float *d_h, float *d_threshold) {
#pragma omp parallel for schedule(static)
    for (i64 block = 0; block < size; block++) {
        i64 last = (block + 1) * BLOCK < total ? (block + 1) * BLOCK : total;
        for (i64 e = block * BLOCK; e < last; e += WIDE) {
            wide x = load(h, 1, e, last - e, INFINITY), t = load(threshold, 1, e, last - e, 1.0f);
            mask near = is_near(x, t, bandwidth); /* never where the threshold is 0 */
            wide paid = *price * (weight ? load(weight, 1, e, last - e, 0.0f) : all(1.0f));
            wide edge = (load(gain, 1, e, last - e, 0.0f) + paid) / (bandwidth * t);
            edge = pick(near, edge, all(0.0f));
            store(pick(load_mask(on, e, last - e), load(grad, 1, e, last - e, 0.0f), all(0.0f)), e, last - e, d_amplitude);
            if (d_h) store(strength * edge, e, last - e, d_h);
            store(pick(near, -edge * (x / t), all(0.0f)), e, last - e, d_threshold);
        }
    }
}
