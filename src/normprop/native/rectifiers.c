/* Moments behind leaky rectifiers and their gradients: `normprop.rectifier_lane` has the equations.
 *
 * The file includes itself to define everything for float and for double; inside, all is double.
 */
#ifndef REAL

#include <float.h>
#include <math.h>
#include <stdint.h>

/* Φ(m/√v), E relu(u), φ(m/√v)/√v and Var relu(u). Of E relu(u) and E relu(−u), that beyond the mean's side is computed and
 * |m| added for the other, so that neither cancels. */
typedef struct {
    double cdf, positive, ratio, rectified;
} values;

static values rectify(double m, double v)
{
    const double distance = fabs(m), std = sqrt(v > 0 ? v : DBL_MIN), t = distance / std;
    const double tail = 0.5 * erfc(t * 0.70710678118654752440), pdf = exp(-0.5 * t * t) * 0.39894228040143267794;
    const double low = std * pdf - distance * tail, high = low + distance;
    const double cdf = m > 0 ? 1 - tail : tail, rectified = v * cdf - low * high;
    return (values){cdf, m > 0 ? high : low, v > 0 ? pdf / std : 0, rectified < 0 ? 0 : rectified};
}

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
    const double b = 1 - a;
    for (int64_t i = 0; i < count; i++) {
        const NAME(rectifier) *x = &all[i];
        for (int64_t j = 0; j < x->size; j++) {
            const double m = x->mean[j], v = x->var[j];
            const values r = rectify(m, v);
            if (!x->by_mean) {
                x->first[j] = (REAL)(b * r.positive + a * m);
                x->second[j] = (REAL)(b * b * r.rectified + v * (2 * a * b * r.cdf + a * a));
                continue;
            }
            const double g = x->by_first ? x->by_first[j] : 0, h = x->by_second ? x->by_second[j] : 0;
            const double by_mean = b * b * 2 * r.positive * (1 - r.cdf) + 2 * a * b * r.ratio * v;
            const double by_var =
                b * b * (r.cdf - r.positive * r.ratio) + 2 * a * b * (r.cdf - 0.5 * r.ratio * m) + a * a;
            x->by_mean[j] = (REAL)(h * by_mean + g * (b * r.cdf + a));
            x->by_var[j] = (REAL)(h * by_var + g * 0.5 * b * r.ratio);
        }
    }
}

#endif
