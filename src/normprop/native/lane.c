/* A segment of a moment lane: what moments become between sites, then the scales of sites; and all of its gradients.
 *
 * The file includes itself to define everything for float and for double.
 */
#ifndef REAL

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "moments.h"
#include "threads.h"

/* One scale of one site, 64 bits a field; tensors and outputs by their numbers, −1 for none. */
typedef struct {
    int64_t weight, gamma, beta, shift, scale, directions;
    int64_t mean, var;    /* places of the moments of the layer's input, −1 where it is standardised */
    int64_t column;       /* place of its channels among those of all */
    int64_t groups, filters, inputs, taps, taps_first, stride, center, blocks, rank; /* as in scales.h */
} scaling;

#define REAL float
#define NAME(name) name##_float
#include "lane.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_double
#include "lane.c"

#else

#include "scales.h"

/* Sites as scales.c takes them; `columns` has five numbers a channel: f, b, the mean of each filter, E and V. */
static void NAME(laid)(const scaling *all, int64_t count, int64_t channels, REAL *const *tensors, REAL *const *outputs,
                       const REAL *memory, REAL *columns, NAME(site) *sites)
{
    for (int64_t i = 0; i < count; i++) {
        const scaling *s = &all[i];
        REAL *column = columns + s->column;
        sites[i] = (NAME(site)){
            .weight = s->weight < 0 ? NULL : tensors[s->weight],
            .mean = s->mean < 0 ? NULL : memory + s->mean,
            .var = s->var < 0 ? NULL : memory + s->var,
            .gamma = tensors[s->gamma], .beta = tensors[s->beta], .shift = tensors[s->shift], .scale = tensors[s->scale],
            .directions = s->directions < 0 ? NULL : tensors[s->directions],
            .multiplied = outputs ? outputs[i] : NULL,
            .factor = column, .offset = column + channels, .average = column + 2 * channels,
            .first = column + 3 * channels, .second = column + 4 * channels,
            .groups = s->groups, .filters = s->filters, .inputs = s->inputs, .taps = s->taps,
            .taps_first = s->taps_first, .stride = s->stride, .center = s->center, .blocks = s->blocks, .rank = s->rank,
        };
    }
}

/* Moments into `memory`, scales into `columns` and the filters of each site into `outputs`. Returns 0, or 1 without memory. */
int NAME(lane)(const operation *operations, int64_t steps, const scaling *scalings, int64_t count, int64_t channels,
               REAL *const *tensors, REAL *const *outputs, REAL *memory, REAL *columns, parallel_t parallel, int64_t threads)
{
    NAME(moments)(operations, steps, tensors, memory, parallel, threads);
    NAME(site) *sites = malloc((count + 1) * sizeof(*sites));
    if (!sites) return 1;
    NAME(laid)(scalings, count, channels, tensors, outputs, memory, columns, sites);
    const int failed = NAME(scales)(sites, NULL, count, parallel, threads);
    free(sites);
    return failed;
}

static int64_t NAME(inputs)(const scaling *s)
{
    return s->weight < 0 ? s->groups * s->filters : s->groups * s->inputs;
}

/* Gradients. `grads` has three for each site, of filters, factor and offset, then what READ reads; `by_weights` is where each
 * site's goes, NULL where not wanted, and `turned` whether as scales.h has it; `results`, as many as tensors, is where those of γ, β and given moments are added;
 * `size` is that of the memory. Returns 0, or 1 without memory. */
int NAME(lane_gradients)(const operation *operations, int64_t steps, const scaling *scalings, int64_t count,
                         int64_t channels, REAL *const *tensors, REAL *const *grads, REAL *const *by_weights,
                         const int64_t *turned, REAL *const *results, const REAL *memory, int64_t size, REAL *columns, parallel_t parallel,
                         int64_t threads)
{
    int64_t parts = 0;
    for (int64_t i = 0; i < count; i++)
        if (scalings[i].mean >= 0) parts += 2 * scalings[i].blocks * NAME(inputs)(&scalings[i]);
    NAME(site) *sites = malloc((count + 1) * sizeof(*sites));
    NAME(gradients) *gradients = malloc((count + 1) * sizeof(*gradients));
    REAL *by = calloc(size + parts + 2 * channels + 1, sizeof(REAL));
    int failed = !sites || !gradients || !by;
    if (!failed) {
        REAL *part = by + size, *by_gamma = part + parts, *by_beta = by_gamma + channels;
        NAME(laid)(scalings, count, channels, tensors, NULL, memory, columns, sites);
        for (int64_t i = 0; i < count; i++) {
            const scaling *s = &scalings[i];
            const int64_t n = s->mean < 0 ? 0 : NAME(inputs)(s);
            gradients[i] = (NAME(gradients)){
                .by_multiplied = grads[3 * i], .by_factor = grads[3 * i + 1], .by_offset = grads[3 * i + 2],
                .by_weight = by_weights[i],
                .by_mean = n ? part : NULL, .by_var = n ? part + n : NULL, .reach = 2 * n,
                .by_gamma = by_gamma + s->column, .by_beta = by_beta + s->column, .turned = turned[i],
            };
            part += 2 * s->blocks * n;
        }
        failed = NAME(scales)(sites, gradients, count, parallel, threads);
        part = by + size;
        for (int64_t i = 0; i < count; i++) {
            const scaling *s = &scalings[i];
            const int64_t n = s->mean < 0 ? 0 : NAME(inputs)(s), outs = s->groups * s->filters;
            for (int64_t b = 0; b < s->blocks && n; b++, part += 2 * n) {
                for (int64_t j = 0; j < n; j++) by[s->mean + j] += part[j];
                for (int64_t j = 0; j < n; j++) by[s->var + j] += part[n + j];
            }
            REAL *gamma = results[s->gamma], *beta = results[s->beta];
            for (int64_t j = 0; gamma && j < outs; j++) gamma[j] += by_gamma[s->column + j];
            for (int64_t j = 0; beta && j < outs; j++) beta[j] += by_beta[s->column + j];
        }
        NAME(moment_gradients)(operations, steps, tensors, memory, grads, results, by);
    }
    free(sites);
    free(gradients);
    free(by);
    return failed;
}

#endif
