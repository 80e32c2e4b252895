/* Moments of activations by the nodes of normprop's `Panels`, one channel at a time, and their derivatives by Stein's identities. */
#include "curves.h"

#include <math.h>
#include <string.h>

/* Over nodes, NODES_TOGETHER at a time whatever the processor: their number is a multiple of that. */
#define EACH(j, n)                                                                                                             \
    for (int64_t block = 0; block < (n); block += NODES_TOGETHER)                                                              \
        _Pragma("omp simd") for (int64_t j = block; j < block + NODES_TOGETHER; j++)

static const double ROOT_HALF = 0.70710678118654752440;
static const double INVERSE_ROOT_TWO_PI = 0.39894228040143267794;

/* e^x − 1 and e^x with x = n log 2 + r, |r| ≤ log(2)/2, and the Taylor polynomial of e^r: plain arithmetic, which compilers
 * do for several numbers at once. */
typedef struct {
    double rest, power; /* e^r − 1, 2^n */
} reduced;

static inline reduced reduce(double x)
{
    const double shift = 6755399441055744.0; /* 1.5 · 2^52: its sum with a small number ends with the number's nearest integer */
    x = x < -700 ? -700 : x > 700 ? 700 : x;
    const double sum = x * 1.44269504088896340736 + shift, n = sum - shift;
    const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r * r + r;
    int64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    bits = (bits + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return (reduced){p, power};
}

static inline double exponential(double x)
{
    const reduced e = reduce(x);
    return e.power * e.rest + e.power;
}

static inline double exponential_less_one(double x)
{
    const reduced e = reduce(x);
    return e.power * e.rest + (e.power - 1);
}

/* σ(u), and σ(u)σ(−u) into `bell`. */
static inline double logistic(double u, double *bell)
{
    const double e = exponential(-fabs(u)), big = 1 / (1 + e), small = e * big;
    *bell = big * small;
    return u < 0 ? small : big;
}

static inline void silu(double u, double *f, double *slope)
{
    double bell;
    const double s = logistic(u, &bell);
    *f = u * s;
    *slope = s + u * bell;
}

static inline void hyperbolic_tangent(double u, double *f, double *slope)
{
    const double e = exponential_less_one(-2 * fabs(u)), low = 2 + e; /* e^(−2|u|) − 1 and 1 + e^(−2|u|) */
    const double t = -e / low;
    *f = u < 0 ? -t : t;
    *slope = 4 * (1 + e) / (low * low);
}

/* u tanh(log(1 + e^u)) with n = e^(−|u|): the tangent is (1 + 2n)/(1 + 2n + 2n²) above 0 and n(n + 2)/(n(n + 2) + 2) below. */
static inline void mish(double u, double *f, double *slope)
{
    const double n = exponential(-fabs(u));
    const double above = 1 + 2 * n, below = n * (n + 2), low = u < 0 ? below + 2 : above + 2 * n * n;
    const double t = (u < 0 ? below : above) / low;
    const double rest = 4 * (1 + n) * (1 + n) * (u < 0 ? 1 : n * n) / (low * low);
    const double s = (u < 0 ? n : 1) / (1 + n);
    *f = u * t;
    *slope = t + u * s * rest;
}

static inline void softplus(double u, double beta, double *f, double *slope)
{
    const double x = beta * u;
    double bell;
    *f = ((x > 0 ? x : 0) + log1p(exp(-fabs(x)))) / beta;
    *slope = logistic(x, &bell);
}

static inline void exponential_linear(double u, double scale, double alpha, double width, double *f, double *slope)
{
    const double low = exponential_less_one((u < 0 ? u : 0) / width);
    *f = scale * (u > 0 ? u : alpha * low);
    *slope = scale * (u > 0 ? 1 : alpha / width * (low + 1));
}

static inline void gelu(double u, double *f, double *slope)
{
    const double cdf = 0.5 * erfc(-u * ROOT_HALF);
    *f = u * cdf;
    *slope = cdf + u * exponential(-0.5 * u * u) * INVERSE_ROOT_TWO_PI;
}

static inline void gelu_tanh(double u, double *f, double *slope)
{
    const double c = 4 * INVERSE_ROOT_TWO_PI, cubic = 0.044715; /* 2√(2/π) */
    double bell;
    const double s = logistic(c * u * (1 + cubic * u * u), &bell);
    *f = u * s;
    *slope = s + u * c * (1 + 3 * cubic * u * u) * bell;
}

/* f and f' at n nodes of one panel. */
static void evaluate(const curve *c, int64_t panel, int64_t n, const double *u, double *f, double *slope)
{
    switch (c->kind) {
    case PIECEWISE: {
        const double *p = c->pieces + 4 * panel;
        const double c0 = p[0], c1 = p[1], c2 = p[2], origin = p[3];
        EACH (j, n) {
            const double o = u[j] - origin;
            f[j] = c0 + o * (c1 + o * c2);
            slope[j] = c1 + 2 * o * c2;
        }
        break;
    }
    case SIGMOID:
        EACH (j, n) f[j] = logistic(u[j], &slope[j]);
        break;
    case TANH:
        EACH (j, n) hyperbolic_tangent(u[j], &f[j], &slope[j]);
        break;
    case SILU:
        EACH (j, n) silu(u[j], &f[j], &slope[j]);
        break;
    case MISH:
        EACH (j, n) mish(u[j], &f[j], &slope[j]);
        break;
    case SOFTPLUS:
        for (int64_t j = 0; j < n; j++) softplus(u[j], c->a, &f[j], &slope[j]);
        break;
    case EXPONENTIAL:
        EACH (j, n) exponential_linear(u[j], c->a, c->b, c->c, &f[j], &slope[j]);
        break;
    case GELU:
        for (int64_t j = 0; j < n; j++) gelu(u[j], &f[j], &slope[j]);
        break;
    default:
        EACH (j, n) gelu_tanh(u[j], &f[j], &slope[j]);
    }
}

static double clamped(double x, double reach)
{
    return x < -reach ? -reach : x > reach ? reach : x;
}

/* Where panel i ends, in standard deviations from the mean; i = 0 is where the first begins. */
static double end(const curve *c, int64_t i, double m, double std)
{
    if (i == 0) return -c->reach;
    if (i == c->panels) return c->reach;
    if (c->kind == PIECEWISE) return clamped((c->knots[i - 1] - m) / std, c->reach);
    const double zero = clamped(-m / std, c->reach), inner = c->bend / std < 2 ? c->bend / std : 2;
    return clamped(zero + (double)(i - 2) * inner, c->reach);
}

static double sum(const double *x)
{
    double total = 0;
    for (int64_t k = 0; k < NODES_TOGETHER; k++) total += x[k];
    return total;
}

void curve_moments(const curve *c, double m, double v, double *result)
{
    double z[MOST_NODES], u[MOST_NODES], w[MOST_NODES], f[MOST_NODES], slope[MOST_NODES];
    int64_t piece = 0;
    while (c->kind == PIECEWISE && piece < c->panels - 1 && m > c->knots[piece]) piece++;
    for (int64_t j = 0; j < NODES_TOGETHER; j++) u[j] = m;
    evaluate(c, piece, NODES_TOGETHER, u, f, slope);
    const double center = f[0];
    const double smallest = c->near * (fabs(m) + fabs(center)) + c->far, root = sqrt(v);
    const double std = root > smallest ? root : smallest, ratio = root / std, shrunk = ratio * ratio;
    int64_t count = 0, place = 0;
    double left = end(c, 0, m, std);
    for (int64_t i = 0; i < c->panels; place += c->counts[i], i++) {
        const double right = end(c, i + 1, m, std), width = right - left;
        if (width > 0) {
            const int64_t n = c->counts[i];
            const double *places = c->places + place, *weights = c->weights + place;
            double *zs = z + count, *us = u + count, *ws = w + count;
            EACH (j, n) {
                const double x = left * (1 - places[j]) + right * places[j];
                zs[j] = x;
                us[j] = m + std * x;
                ws[j] = exponential(-0.5 * x * x) * weights[j] * width;
            }
            evaluate(c, i, n, us, f + count, slope + count);
            count += n;
        }
        left = right;
    }
    double averages[NODES_TOGETHER] = {0}, slopes[NODES_TOGETHER] = {0};
    EACH (j, count) {
        f[j] -= center;
        averages[j - block] += w[j] * f[j];
        slopes[j - block] += w[j] * slope[j];
    }
    const double average = sum(averages), expected = sum(slopes);
    double seconds[NODES_TOGETHER] = {0}, along[NODES_TOGETHER] = {0}, bend[NODES_TOGETHER] = {0}, tilt[NODES_TOGETHER] = {0};
    EACH (j, count) {
        const double off = f[j] - average, turn = w[j] * (slope[j] - expected);
        seconds[j - block] += w[j] * off * off;
        along[j - block] += turn * off;
        bend[j - block] += turn * z[j];
        tilt[j - block] += turn * z[j] * off;
    }
    result[0] = center + average * (c->kinked ? ratio : shrunk);
    result[1] = sum(seconds) * shrunk;
    result[2] = expected;
    result[3] = v > 0 ? sum(bend) / (2 * std) : 0;
    result[4] = 2 * sum(along) * shrunk;
    result[5] = sum(tilt) / std + expected * expected;
}
