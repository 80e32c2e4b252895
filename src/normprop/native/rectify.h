/* A Gaussian behind a rectifier. */
#ifndef NORMPROP_RECTIFY_H
#define NORMPROP_RECTIFY_H

#include <float.h>
#include <math.h>

/* Φ(m/√v), E relu(u), φ(m/√v)/√v and Var relu(u). Of E relu(u) and E relu(−u), that beyond the mean's side is computed and
 * |m| added for the other, so that neither cancels. */
typedef struct {
    double cdf, positive, ratio, rectified;
} rectified;

/* I_2/I_1 for t > 3, I_n = ∫_t^∞ (z − t)ⁿ φ(z) dz. By I_{n+1} = n I_{n−1} − t I_n every r_n = I_n/I_{n−1} is n/(t + r_{n+1});
 * far on they are alike. */
static inline double tail_ratio(double t)
{
    double r = 84 / (t + sqrt(t * t + 168));
    for (int n = 41; n > 1; n--)
        r = n / (t + r);
    return r;
}

static inline rectified rectify(double m, double v)
{
    const double distance = fabs(m), std = sqrt(v > 0 ? v : DBL_MIN), t = distance / std;
    const double tail = 0.5 * erfc(t * 0.70710678118654752440), pdf = exp(-0.5 * t * t) * 0.39894228040143267794;
    double low = std * pdf - distance * tail, var;
    if (m < 0 && t > 3) { /* where both would cancel */
        const double ratio = tail_ratio(t), beyond = tail / (t + ratio);
        low = std * beyond;
        var = v * (beyond * (ratio - beyond));
    } else
        var = v * (m > 0 ? 1 - tail : tail) - low * (low + distance);
    return (rectified){m > 0 ? 1 - tail : tail, m > 0 ? low + distance : low, v > 0 ? pdf / std : 0, var < 0 ? 0 : var};
}

/* Mean and variance behind max(u, 0) + a·min(u, 0). */
static inline void leaky(double m, double v, double a, double *mean, double *var)
{
    const double b = 1 - a;
    const rectified r = rectify(m, v);
    *mean = b * r.positive + a * m;
    *var = b * b * r.rectified + v * (2 * a * b * r.cdf + a * a);
}

/* Gradients of m and v from those of the mean, g, and of the variance, h. */
static inline void leaky_gradients(double m, double v, double a, double g, double h, double *by_mean, double *by_var)
{
    const double b = 1 - a;
    const rectified r = rectify(m, v);
    const double var_by_mean = b * b * 2 * r.positive * (1 - r.cdf) + 2 * a * b * r.ratio * v;
    const double var_by_var = b * b * (r.cdf - r.positive * r.ratio) + 2 * a * b * (r.cdf - 0.5 * r.ratio * m) + a * a;
    *by_mean = h * var_by_mean + g * (b * r.cdf + a);
    *by_var = h * var_by_var + g * 0.5 * b * r.ratio;
}

#endif
