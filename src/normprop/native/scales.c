/* Scales of normalisation sites and their gradients, every filter in one visit: sites/reference.py says what is computed.
 *
 * Compiled where it runs (see library.py). The file includes itself to define everything for float and for double.
 */
#ifndef REAL

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "threads.h"

#define REAL float
#define EPSILON FLT_EPSILON
#define LEAST (FLT_MIN / FLT_EPSILON)
#define NAME(name) name##_float
#include "scales.c"
#undef REAL
#undef EPSILON
#undef LEAST
#undef NAME
#define REAL double
#define EPSILON DBL_EPSILON
#define LEAST (DBL_MIN / DBL_EPSILON)
#define NAME(name) name##_double
#include "scales.c"

#else

#include "scales.h"

typedef struct {
    const NAME(site) *sites;
    const NAME(gradients) *gradients; /* NULL to compute the scales */
    int64_t count;
    _Atomic int64_t next;
    int64_t failed;
} NAME(job);

/* Values per input channel of one group as values per weight of a filter. */
static void NAME(spread)(const NAME(site) *s, const REAL *values, int64_t group, REAL empty, REAL *out)
{
    const int64_t inputs = s->inputs, taps = s->taps;
    for (int64_t i = 0; i < inputs; i++) {
        const REAL value = values ? values[group * inputs + i] : empty;
        if (s->taps_first)
            for (int64_t t = 0; t < taps; t++) out[t * inputs + i] = value;
        else
            for (int64_t t = 0; t < taps; t++) out[i * taps + t] = value;
    }
}

/* The transpose of `spread`. */
static void NAME(gather)(const NAME(site) *s, const REAL *values, int64_t group, REAL *out)
{
    const int64_t inputs = s->inputs, taps = s->taps;
    for (int64_t i = 0; i < inputs; i++) {
        REAL sum = 0;
        if (s->taps_first)
            for (int64_t t = 0; t < taps; t++) sum += values[t * inputs + i];
        else
            for (int64_t t = 0; t < taps; t++) sum += values[i * taps + t];
        out[group * inputs + i] = sum;
    }
}

/* A filter whose taps lie outside its inputs as one whose taps lie inside. */
static void NAME(turn)(const NAME(site) *s, const REAL *from, REAL *out)
{
    const int64_t inputs = s->inputs, taps = s->taps;
    for (int64_t i = 0; i < inputs; i++)
        for (int64_t t = 0; t < taps; t++) out[i * taps + t] = from[t * inputs + i];
}

static REAL NAME(sum)(const REAL *x, int64_t n)
{
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += x[j];
    return sum;
}

/* Mean of n numbers. A sum of many is off by many roundings; what is left of it takes these away. */
static REAL NAME(mean)(const REAL *x, int64_t n)
{
    const REAL first = NAME(sum)(x, n) / n;
    REAL rest = 0;
#pragma omp simd reduction(+ : rest)
    for (int64_t j = 0; j < n; j++) rest += x[j] - first;
    return first + rest / n;
}

/* Whether n numbers are all zero: several at a time, for as long as it looks like it. */
static int NAME(nothing)(const REAL *x, int64_t n)
{
    for (int64_t from = 0; from < n; from += 1024) {
        const int64_t to = from + 1024 < n ? from + 1024 : n;
        int some = 0;
#pragma omp simd reduction(| : some)
        for (int64_t j = from; j < to; j++) some |= x[j] != 0;
        if (some) return 0;
    }
    return 1;
}

/* √v U of a group; returns how many directions there are, none where all of them are zeros still. */
static int64_t NAME(lean)(const NAME(site) *s, const REAL *v, int64_t group, REAL *basis)
{
    const int64_t n = s->inputs * s->taps;
    if (NAME(nothing)(s->directions + group * s->rank * n, s->rank * n)) return 0;
    for (int64_t r = 0; r < s->rank; r++) {
        const REAL *u = s->directions + (group * s->rank + r) * n;
        for (int64_t j = 0; j < n; j++) basis[r * n + j] = v[j] > 0 ? (REAL)sqrt(v[j]) * u[j] : 0;
    }
    return s->rank;
}

/* p = Σ c √v U: how far a filter, less `a`, lies along each direction; four at a time, as it is read once for them. */
static void NAME(along)(const REAL *w, REAL a, const REAL *basis, int64_t rank, int64_t n, REAL *p)
{
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) {
        const REAL *b = basis + r * n;
        REAL p0 = 0, p1 = 0, p2 = 0, p3 = 0;
#pragma omp simd reduction(+ : p0, p1, p2, p3)
        for (int64_t j = 0; j < n; j++) {
            const REAL c = w[j] - a;
            p0 += c * b[j];
            p1 += c * b[n + j];
            p2 += c * b[2 * n + j];
            p3 += c * b[3 * n + j];
        }
        p[r] = p0, p[r + 1] = p1, p[r + 2] = p2, p[r + 3] = p3;
    }
    for (; r < rank; r++) {
        const REAL *b = basis + r * n;
        REAL p0 = 0;
#pragma omp simd reduction(+ : p0)
        for (int64_t j = 0; j < n; j++) p0 += (w[j] - a) * b[j];
        p[r] = p0;
    }
}

/* t = scale · Σ p √v U. */
static void NAME(towards)(const REAL *p, REAL scale, const REAL *basis, int64_t rank, int64_t n, REAL *t)
{
    int64_t r = 0;
    for (int64_t j = 0; j < n; j++) t[j] = 0;
    for (; r + 4 <= rank; r += 4) {
        const REAL *b = basis + r * n;
        const REAL p0 = scale * p[r], p1 = scale * p[r + 1], p2 = scale * p[r + 2], p3 = scale * p[r + 3];
#pragma omp simd
        for (int64_t j = 0; j < n; j++) t[j] += p0 * b[j] + p1 * b[n + j] + p2 * b[2 * n + j] + p3 * b[3 * n + j];
    }
    for (; r < rank; r++) {
        const REAL *b = basis + r * n;
        const REAL p0 = scale * p[r];
#pragma omp simd
        for (int64_t j = 0; j < n; j++) t[j] += p0 * b[j];
    }
}

/* f and b from E and V; a variance of zero counts as one. */
static void NAME(finish)(const NAME(site) *s, int64_t o, REAL first, REAL second)
{
    const REAL inverse = 1 / (REAL)sqrt(s->scale[o] * (second > 0 ? second : 1));
    s->first[o] = first;
    s->second[o] = second;
    s->factor[o] = s->gamma[o] * inverse;
    s->offset[o] = s->beta[o] - first * s->factor[o] - s->gamma[o] * s->shift[o] / (REAL)sqrt(s->scale[o]);
}

static void NAME(forward)(const NAME(site) *s, int64_t from, int64_t to, REAL *scratch)
{
    if (!s->weight) {
        const REAL least = (REAL)pow(LEAST, 2.0 / 3); /* a derivative has the power −3/2 of the variance */
        for (int64_t o = from; o < to; o++) {
            const REAL given = s->var ? s->var[o] : 1;
            NAME(finish)(s, o, s->mean ? s->mean[o] : 0, given > least ? given : 0);
            s->average[o] = 0;
        }
        return;
    }
    const int64_t n = s->inputs * s->taps;
    REAL *m = scratch, *v = scratch + n, *basis = scratch + 6 * n, *p = basis + s->rank * n;
    int64_t group = -1, rank = 0;
    REAL total = 0;
    for (int64_t o = from; o < to; o++) {
        if (o / s->filters != group) {
            group = o / s->filters;
            NAME(spread)(s, s->mean, group, 0, m);
            NAME(spread)(s, s->var, group, 1, v);
            rank = NAME(lean)(s, v, group, basis);
            total = NAME(sum)(v, n);
        }
        const REAL *w = s->weight + o * n;
        const REAL a = s->center ? (REAL)s->center / 256 * NAME(mean)(w, n) : 0;
        REAL first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
        for (int64_t j = 0; j < n; j++) {
            const REAL c = w[j] - a;
            first += c * m[j];
            second += c * c * v[j];
        }
        /* A filter of equal weights, once centred, is rounding; and quotients of what is smaller than LEAST overflow. */
        const REAL rounding = 16 * EPSILON * a;
        if (second <= LEAST || second <= rounding * rounding * total) {
            second = 0;
        } else {
            NAME(along)(w, a, basis, rank, n, p);
            for (int64_t r = 0; r < rank; r++) second += s->stride * p[r] * p[r];
        }
        NAME(finish)(s, o, first / s->stride, second / s->stride);
        s->average[o] = a;
        REAL *out = s->multiplied + o * n;
        const REAL f = s->factor[o];
#pragma omp simd
        for (int64_t j = 0; j < n; j++) out[j] = f * (w[j] - a);
    }
}

/* q = h − g E, ∂L/∂γ = q r − g d/√k, ∂L/∂β = g; gives ∂L/∂E and ∂L/∂V. */
static void NAME(start)(const NAME(site) *s, const NAME(gradients) *d, int64_t o, REAL h, REAL *by_first, REAL *by_second)
{
    const REAL g = d->by_offset ? d->by_offset[o] : 0, second = s->second[o], f = s->factor[o];
    const REAL q = h - g * s->first[o];
    d->by_gamma[o] = (q / (REAL)sqrt(second > 0 ? second : 1) - g * s->shift[o]) / (REAL)sqrt(s->scale[o]);
    d->by_beta[o] = g;
    *by_first = -g * f;
    *by_second = second > 0 ? (REAL)-0.5 * q * f / second : 0;
}

/* Hand on what a group's filters said of its inputs. */
static void NAME(leave)(const NAME(site) *s, const NAME(gradients) *d, int64_t group, int64_t block, REAL *scratch)
{
    const int64_t n = s->inputs * s->taps;
    const REAL *v = scratch + n, *by_m = scratch + 2 * n, *by_root = scratch + 4 * n;
    REAL *by_v = scratch + 3 * n;
    if (s->rank)
        for (int64_t j = 0; j < n; j++)
            if (v[j] > 0) by_v[j] += by_root[j] / (2 * v[j]);
    if (d->by_mean) NAME(gather)(s, by_m, group, d->by_mean + block * d->reach);
    if (d->by_var) NAME(gather)(s, by_v, group, d->by_var + block * d->reach);
}

static void NAME(backward)(
    const NAME(site) *s, const NAME(gradients) *d, int64_t from, int64_t to, int64_t block, REAL *scratch)
{
    const int64_t n = s->inputs * s->taps;
    REAL e, u;
    if (!s->weight) {
        for (int64_t o = from; o < to; o++) {
            NAME(start)(s, d, o, d->by_factor ? d->by_factor[o] : 0, &e, &u);
            if (d->by_mean) d->by_mean[o] = e;
            if (d->by_var) d->by_var[o] = u;
        }
        return;
    }
    REAL *m = scratch, *v = scratch + n, *by_m = scratch + 2 * n, *by_v = scratch + 3 * n;
    REAL *by_root = scratch + 4 * n, *t = scratch + 5 * n, *basis = scratch + 6 * n, *p = basis + s->rank * n;
    REAL *row = p + s->rank;
    int64_t group = -1, rank = 0;
    const REAL part = (REAL)s->center / 256;
    REAL mean = 0;
    for (int64_t o = from; o < to; o++) {
        if (o / s->filters != group) {
            if (group >= 0) NAME(leave)(s, d, group, block, scratch);
            group = o / s->filters;
            NAME(spread)(s, s->mean, group, 0, m);
            NAME(spread)(s, s->var, group, 1, v);
            rank = NAME(lean)(s, v, group, basis);
            mean = NAME(sum)(m, n) / n;
            for (int64_t j = 0; j < 3 * n; j++) by_m[j] = 0;
        }
        const REAL *w = s->weight + o * n, *G = d->by_multiplied ? d->by_multiplied + o * n : NULL;
        const REAL a = s->center ? s->average[o] : 0, f = s->factor[o];
        REAL dot = 0, sum = 0, weighted = 0;
        if (G) {
#pragma omp simd reduction(+ : dot, sum, weighted)
            for (int64_t j = 0; j < n; j++) {
                const REAL c = w[j] - a;
                dot += G[j] * c;
                sum += G[j];
                weighted += c * v[j];
            }
        } else if (s->center) {
#pragma omp simd reduction(+ : weighted)
            for (int64_t j = 0; j < n; j++) weighted += (w[j] - a) * v[j];
        }
        NAME(start)(s, d, o, dot, &e, &u);
        e /= s->stride;
        u /= s->stride;
        const REAL less = s->center ? part * ((f * sum + 2 * u * weighted) / n + e * mean) : 0; /* what centring takes away */
        const REAL twice = 2 * u;
        REAL *out = !d->by_weight ? NULL : d->turned ? row : d->by_weight + o * n;
        if (out && G) {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                const REAL c = w[j] - a;
                by_m[j] += e * c;
                by_v[j] += u * c * c;
                out[j] = f * G[j] + e * m[j] + twice * c * v[j] - less;
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                const REAL c = w[j] - a;
                by_m[j] += e * c;
                by_v[j] += u * c * c;
            }
            if (out) {
#pragma omp simd
                for (int64_t j = 0; j < n; j++) out[j] = e * m[j] + twice * (w[j] - a) * v[j] - less;
            }
        }
        if (rank) {
            NAME(along)(w, a, basis, rank, n, p);
            NAME(towards)(p, s->stride * twice, basis, rank, n, t);
            const REAL even = s->center ? part * NAME(sum)(t, n) / n : 0;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) by_root[j] += (w[j] - a) * t[j];
            if (out) {
#pragma omp simd
                for (int64_t j = 0; j < n; j++) out[j] += t[j] - even;
            }
        }
        if (out && d->turned) NAME(turn)(s, out, d->by_weight + o * n);
    }
    if (group >= 0) NAME(leave)(s, d, group, block, scratch);
}

static void NAME(work)(void *data)
{
    NAME(job) *job = data;
    REAL *scratch = NULL;
    int64_t room = 0;
    for (;;) {
        int64_t item = atomic_fetch_add(&job->next, 1), i = 0;
        while (i < job->count && item >= job->sites[i].blocks) item -= job->sites[i++].blocks;
        if (i == job->count) break;
        const NAME(site) *s = &job->sites[i];
        const int64_t rows = s->groups * s->filters, step = (rows + s->blocks - 1) / s->blocks;
        const int64_t from = item * step, to = from + step < rows ? from + step : rows;
        const int64_t needed = (7 + s->rank) * s->inputs * s->taps + s->rank;
        if (room < needed) {
            room = needed;
            free(scratch);
            scratch = malloc(room * sizeof(REAL));
            if (!scratch) {
                job->failed = 1;
                return;
            }
        }
        if (job->gradients)
            NAME(backward)(s, &job->gradients[i], from, to, item, scratch);
        else
            NAME(forward)(s, from, to, scratch);
    }
    free(scratch);
}

/* Scales of `count` sites, or, with `gradients`, their gradients. Returns 0, or 1 without memory. */
int NAME(scales)(
    const NAME(site) *sites, const NAME(gradients) *gradients, int64_t count, parallel_t parallel, int64_t threads)
{
    NAME(job) job = {sites, gradients, count, 0, 0};
    int64_t items = 0;
    for (int64_t i = 0; i < count; i++) items += sites[i].blocks;
    if (threads > items) threads = items;
    if (parallel && threads > 1)
        parallel(NAME(work), &job, (unsigned)threads, 0);
    else
        NAME(work)(&job);
    return (int)job.failed;
}

#endif
