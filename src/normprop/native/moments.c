/* How moments flow between sites: a list of small operations on means and variances, forward and backward.
 *
 * All numbers lie in one piece of memory, the means of a tensor in one place of it and the variances in another. The file
 * includes itself to define everything for float and for double.
 */
#ifndef REAL

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>

#include "moments.h"
#include "rectify.h"

#define REAL float
#define NAME(name) name##_float
#include "moments.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_double
#include "moments.c"

#else

typedef struct {
    const operation *operation;
    REAL *numbers;
    _Atomic int64_t next;
} NAME(curving);

/* Channels of one activation, some at a time by whichever thread is free. */
static void NAME(curve_some)(void *data)
{
    enum { SOME = 16 };
    NAME(curving) *job = data;
    const operation *o = job->operation;
    REAL *x = job->numbers;
    const int64_t step = o->a_size > 1;
    int64_t start;
    while ((start = atomic_fetch_add(&job->next, SOME)) < o->size)
        for (int64_t j = start; j < start + SOME && j < o->size; j++) {
            double found[6];
            curve_moments(o->curve, x[o->a_mean + j * step], x[o->a_var + j * step], found);
            x[o->mean + j] = (REAL)found[0];
            x[o->var + j] = (REAL)found[1];
            for (int64_t k = 0; k < 4; k++) x[o->slopes + k * o->size + j] = (REAL)found[2 + k];
        }
}

static void NAME(curved)(const operation *o, REAL *x, parallel_t parallel, int64_t threads)
{
    NAME(curving) job = {.operation = o, .numbers = x};
    if (parallel && threads > 1 && o->size > 64)
        parallel(NAME(curve_some), &job, (unsigned)threads, 0);
    else
        NAME(curve_some)(&job);
}

/* One activation alone: `x` has `size` means, then as many variances, and gets both of what comes out and four derivatives. */
void NAME(curve)(const curve *c, REAL *x, int64_t size, parallel_t parallel, int64_t threads)
{
    const operation o = {
        .kind = CURVED, .size = size, .a_var = size, .a_size = size,
        .mean = 2 * size, .var = 3 * size, .slopes = 4 * size, .curve = c,
    };
    NAME(curved)(&o, x, parallel, threads);
}

/* A linear map without a site: E = W m + offset, Var = W² v, W in filters of `inputs` channels with some taps each. */
static void NAME(map)(const operation *o, REAL *const *tensors, REAL *x)
{
    const int64_t step = o->a_size > 1, filters = o->size / o->groups, inputs = (int64_t)o->number, taps = o->taps;
    const REAL *offset = o->second < 0 ? NULL : tensors[o->second];
    for (int64_t j = 0; j < o->size; j++) {
        const REAL *w = tensors[o->first] + j * inputs * taps;
        const int64_t start = j / filters * inputs;
        const REAL *am = x + o->a_mean + start * step, *av = x + o->a_var + start * step;
        REAL mean = 0, var = 0;
        if (taps == 1 && step) {
#pragma omp simd reduction(+ : mean, var)
            for (int64_t i = 0; i < inputs; i++) {
                mean += w[i] * am[i];
                var += w[i] * w[i] * av[i];
            }
        } else
            for (int64_t i = 0; i < inputs * taps; i++) {
                mean += w[i] * am[i / taps * step];
                var += w[i] * w[i] * av[i / taps * step];
            }
        x[o->mean + j] = mean + (offset ? offset[j] : 0);
        x[o->var + j] = var;
    }
}

/* Gradients of its weight and offset, where wanted, and of its argument. */
static void NAME(map_gradients)(const operation *o, REAL *const *tensors, const REAL *x, REAL *const *results, REAL *by)
{
    const int64_t step = o->a_size > 1, filters = o->size / o->groups, inputs = (int64_t)o->number, taps = o->taps;
    REAL *by_offset = o->second < 0 ? NULL : results[o->second];
    for (int64_t j = 0; j < o->size; j++) {
        const REAL g = by[o->mean + j], h = by[o->var + j];
        const REAL *w = tensors[o->first] + j * inputs * taps;
        REAL *by_w = results[o->first] ? results[o->first] + j * inputs * taps : NULL;
        const int64_t start = j / filters * inputs;
        const REAL *am = x + o->a_mean + start * step, *av = x + o->a_var + start * step;
        REAL *by_am = by + o->a_mean + start * step, *by_av = by + o->a_var + start * step;
        if (by_offset) by_offset[j] += g;
        if (taps == 1 && step) {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) {
                by_am[i] += g * w[i];
                by_av[i] += h * w[i] * w[i];
            }
            if (by_w)
#pragma omp simd
                for (int64_t i = 0; i < inputs; i++) by_w[i] += g * am[i] + 2 * h * w[i] * av[i];
        } else
            for (int64_t i = 0; i < inputs * taps; i++) {
                const int64_t p = i / taps * step;
                by_am[p] += g * w[i];
                by_av[p] += h * w[i] * w[i];
                if (by_w) by_w[i] += g * am[p] + 2 * h * w[i] * av[p];
            }
    }
}

void NAME(moments)(const operation *all, int64_t count, REAL *const *tensors, REAL *x, parallel_t parallel, int64_t threads)
{
    for (int64_t i = 0; i < count; i++) {
        const operation *o = &all[i];
        if (o->kind == CURVED) {
            NAME(curved)(o, x, parallel, threads);
            continue;
        }
        if (o->kind == MAPPED) {
            NAME(map)(o, tensors, x);
            continue;
        }
        const int64_t step = o->a_size > 1, apart = o->b_size > 1;
        const REAL *am = x + o->a_mean, *av = x + o->a_var, *bm = x + o->b_mean, *bv = x + o->b_var;
        const REAL *first = NULL, *second = NULL;
        if (o->kind == GIVEN || o->kind == SITE) {
            first = tensors[o->first];
            second = tensors[o->second];
        }
        const REAL k = (REAL)o->number, other = (REAL)o->other;
        REAL *m = x + o->mean, *v = x + o->var;
        for (int64_t j = 0; j < o->size; j++) {
            const int64_t p = j * step, q = j * apart;
            double mean, var;
            switch (o->kind) {
            case STANDARD:
                m[j] = 0;
                v[j] = 1;
                break;
            case GIVEN:
                m[j] = first[p];
                v[j] = second[q];
                break;
            case SITE:
                m[j] = second[j];
                v[j] = first[j] * first[j];
                break;
            case RECTIFIED:
                leaky(am[p], av[p], o->number, &mean, &var);
                m[j] = (REAL)mean;
                v[j] = (REAL)var;
                break;
            case SUM:
                m[j] = am[p] + k * bm[q];
                v[j] = av[p] + k * k * bv[q];
                break;
            case PRODUCT:
                m[j] = am[p] * bm[q];
                v[j] = av[p] * bv[q] + am[p] * am[p] * bv[q] + bm[q] * bm[q] * av[p];
                break;
            case SCALED:
                m[j] = k * am[p];
                v[j] = other * av[p];
                break;
            case LARGEST:
                m[j] = am[p] + k * (av[p] > 0 ? (REAL)sqrt(av[p]) : 0);
                v[j] = other * av[p];
                break;
            case WIDENED:
                m[j] = am[p];
                v[j] = av[p] + other;
                break;
            case READ:
                break;
            default:
                m[j] = am[p];
                v[j] = av[p];
            }
        }
    }
}

void NAME(moment_gradients)(const operation *all, int64_t count, REAL *const *tensors, const REAL *x, REAL *const *grads,
                            REAL *const *results, REAL *by)
{
    for (int64_t i = count - 1; i >= 0; i--) {
        const operation *o = &all[i];
        if (o->kind == MAPPED) {
            NAME(map_gradients)(o, tensors, x, results, by);
            continue;
        }
        const int64_t step = o->a_size > 1, apart = o->b_size > 1;
        const REAL *am = x + o->a_mean, *av = x + o->a_var, *bm = x + o->b_mean, *bv = x + o->b_var;
        const REAL *slopes = x + o->slopes;
        const REAL *first = NULL, *second = NULL;
        REAL *by_first = NULL, *by_second = NULL;
        if (o->kind == READ) {
            first = grads[o->first];
            second = grads[o->second];
        } else if (o->kind == GIVEN || o->kind == SITE) {
            first = tensors[o->first];
            by_first = results[o->first];
            by_second = results[o->second];
        }
        const REAL k = (REAL)o->number, other = (REAL)o->other;
        REAL *by_am = by + o->a_mean, *by_av = by + o->a_var, *by_bm = by + o->b_mean, *by_bv = by + o->b_var;
        REAL *gm = by + o->mean, *gv = by + o->var;
        for (int64_t j = 0; j < o->size; j++) {
            const int64_t p = j * step, q = j * apart;
            const REAL g = gm[j], h = gv[j];
            double mean, var;
            switch (o->kind) {
            case READ:
                if (first) gm[j] += first[j];
                if (second) gv[j] += second[j];
                break;
            case STANDARD:
            case DETACHED:
                break;
            case GIVEN:
                if (by_first) by_first[p] += g;
                if (by_second) by_second[q] += h;
                break;
            case SITE:
                if (by_first) by_first[j] += 2 * first[j] * h;
                if (by_second) by_second[j] += g;
                break;
            case RECTIFIED:
                leaky_gradients(am[p], av[p], o->number, g, h, &mean, &var);
                by_am[p] += (REAL)mean;
                by_av[p] += (REAL)var;
                break;
            case SUM:
                by_am[p] += g;
                by_av[p] += h;
                by_bm[q] += k * g;
                by_bv[q] += k * k * h;
                break;
            case PRODUCT:
                by_am[p] += g * bm[q] + 2 * h * am[p] * bv[q];
                by_av[p] += h * (bv[q] + bm[q] * bm[q]);
                by_bm[q] += g * am[p] + 2 * h * bm[q] * av[p];
                by_bv[q] += h * (av[p] + am[p] * am[p]);
                break;
            case SCALED:
                by_am[p] += k * g;
                by_av[p] += other * h;
                break;
            case LARGEST:
                by_am[p] += g;
                by_av[p] += other * h + (av[p] > 0 ? g * k / (2 * (REAL)sqrt(av[p])) : 0);
                break;
            case CURVED:
                by_am[p] += g * slopes[j] + h * slopes[2 * o->size + j];
                by_av[p] += g * slopes[o->size + j] + h * slopes[3 * o->size + j];
                break;
            default:
                by_am[p] += g;
                by_av[p] += h;
            }
        }
    }
}

#endif
