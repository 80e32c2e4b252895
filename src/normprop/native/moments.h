/* Operations on moments. */
#ifndef NORMPROP_MOMENTS_H
#define NORMPROP_MOMENTS_H

#include <stdint.h>

#include "curves.h"
#include "threads.h"

enum { STANDARD, GIVEN, SITE, RECTIFIED, SUM, PRODUCT, SCALED, COPIED, DETACHED, READ, CURVED, MAPPED, LARGEST, WIDENED };

/* One operation, 64 bits a field: places are counted in numbers from the beginning of the memory. */
typedef struct {
    int64_t kind;
    int64_t size;                 /* channels of what it gives */
    int64_t mean, var;            /* where that is */
    int64_t a_mean, a_var, a_size; /* first argument; one number stands for all channels */
    int64_t b_mean, b_var, b_size; /* second argument of SUM and PRODUCT */
    int64_t first, second;        /* which tensors. GIVEN: mean and variance; SITE: γ and β; READ: whose gradients arrive;
                                   * MAPPED: weight, and offset or −1 */
    double number;                /* RECTIFIED: slope below zero; SUM: factor of b; SCALED: factor of the mean; LARGEST: how
                                   * many standard deviations the mean moves */
    double other;                 /* SCALED, LARGEST: factor of the variance; WIDENED: what is added to it */
    int64_t groups, taps;         /* MAPPED */
    int64_t slopes;               /* CURVED: where four derivatives are, as many numbers each as the result has */
    const curve *curve;           /* CURVED */
} operation;

/* Mean and variance of everything, with tensors by their numbers. */
void moments_float(const operation *all, int64_t count, float *const *tensors, float *x, parallel_t parallel, int64_t threads);
void moments_double(const operation *all, int64_t count, double *const *tensors, double *x, parallel_t parallel,
                    int64_t threads);

/* Gradients of everything; `by` begins as zeros, or as gradients that arrive. `grads` has what READ reads, NULL for zero; to
 * `results`, as many as tensors, gradients are added where it isn't NULL. */
void moment_gradients_float(const operation *all, int64_t count, float *const *tensors, const float *x,
                            float *const *grads, float *const *results, float *by);
void moment_gradients_double(const operation *all, int64_t count, double *const *tensors, const double *x,
                             double *const *grads, double *const *results, double *by);

#endif
