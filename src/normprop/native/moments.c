/* How moments flow between sites: a list of small operations on means and variances, forward and backward.
 *
 * All numbers lie in one piece of memory, the means of a tensor in one place of it and the variances in another. The file
 * includes itself to define everything for float and for double.
 */
#ifndef REAL

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

void NAME(moments)(const operation *all, int64_t count, REAL *const *tensors, REAL *x)
{
    for (int64_t i = 0; i < count; i++) {
        const operation *o = &all[i];
        const int64_t step = o->a_size > 1, other = o->b_size > 1;
        const REAL *am = x + o->a_mean, *av = x + o->a_var, *bm = x + o->b_mean, *bv = x + o->b_var;
        const REAL *first = NULL, *second = NULL;
        if (o->kind == GIVEN || o->kind == SITE) {
            first = tensors[o->first];
            second = tensors[o->second];
        }
        const REAL k = (REAL)o->number;
        REAL *m = x + o->mean, *v = x + o->var;
        for (int64_t j = 0; j < o->size; j++) {
            const int64_t p = j * step, q = j * other;
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
                v[j] = k * k * av[p];
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
        const int64_t step = o->a_size > 1, other = o->b_size > 1;
        const REAL *am = x + o->a_mean, *av = x + o->a_var, *bm = x + o->b_mean, *bv = x + o->b_var;
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
        const REAL k = (REAL)o->number;
        REAL *by_am = by + o->a_mean, *by_av = by + o->a_var, *by_bm = by + o->b_mean, *by_bv = by + o->b_var;
        REAL *gm = by + o->mean, *gv = by + o->var;
        for (int64_t j = 0; j < o->size; j++) {
            const int64_t p = j * step, q = j * other;
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
                by_av[p] += k * k * h;
                break;
            default:
                by_am[p] += g;
                by_av[p] += h;
            }
        }
    }
}

#endif
