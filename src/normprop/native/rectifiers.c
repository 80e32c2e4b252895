/* Moments behind leaky rectifiers and their gradients: activations/rectifier_moments.py has the equations.
 *
 * The file includes itself to define everything for float and for double; inside, all is double.
 */
#ifndef REAL

#include <stddef.h>
#include <stdint.h>

#include "rectify.h"

#define REAL float
#define NAME(name) name##_float
#include "rectifiers.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_double
#include "rectifiers.c"

#else

/* One tensor of Gaussians, 64 bits a field. Gradients may be NULL for zero. */
typedef struct {
    const REAL *mean, *var;
    REAL *first, *second;                /* out: E f and Var f; not used for gradients */
    const REAL *by_first, *by_second;
    REAL *by_mean, *by_var;              /* out, if not NULL: gradients instead */
    int64_t size;
} NAME(rectifier);

/* E f and Var f, or gradients, of `count` tensors behind max(u, 0) + a·min(u, 0). */
void NAME(rectifiers)(const NAME(rectifier) *all, int64_t count, double a)
{
    for (int64_t i = 0; i < count; i++) {
        const NAME(rectifier) *x = &all[i];
        for (int64_t j = 0; j < x->size; j++) {
            double first, second;
            if (!x->by_mean) {
                leaky(x->mean[j], x->var[j], a, &first, &second);
                x->first[j] = (REAL)first;
                x->second[j] = (REAL)second;
                continue;
            }
            const double g = x->by_first ? x->by_first[j] : 0, h = x->by_second ? x->by_second[j] : 0;
            leaky_gradients(x->mean[j], x->var[j], a, g, h, &first, &second);
            x->by_mean[j] = (REAL)first;
            x->by_var[j] = (REAL)second;
        }
    }
}

#endif
