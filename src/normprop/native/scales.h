/* What scales.c takes, for the REAL and NAME that are defined where this is included. */

/* One site, as library callers lay it out: every field takes 64 bits. Pointers may be NULL where said. */
typedef struct {
    const REAL *weight;  /* (groups · filters, fan-in), filters one behind the other; NULL for a site without a layer */
    const REAL *mean;    /* m a channel of the input; NULL for 0 */
    const REAL *var;     /* v; NULL for 1 */
    const REAL *gamma, *beta, *shift, *scale; /* γ, β, d, k a filter */
    const REAL *directions; /* U, (groups · rank, fan-in), as the weight lies; NULL without */
    REAL *multiplied;    /* out: f c, as the weight lies; not used for gradients */
    REAL *factor, *offset, *average; /* out: f, b, and what each filter is less by */
    REAL *first, *second; /* out: E and V */
    int64_t groups, filters, inputs, taps; /* filters and inputs are those of one group */
    int64_t taps_first;  /* whether the taps of a filter lie outside its inputs in memory */
    int64_t stride;      /* an output position sees every stride-th weight: more than 1 for transposed convolutions */
    int64_t center;      /* how many 256ths of each filter's mean are subtracted */
    int64_t blocks;      /* into how many runs of filters it is divided */
    int64_t rank;        /* directions of a group */
} NAME(site);

/* Gradients of one site's outputs, NULL for zero, and of its inputs, NULL where not wanted. */
typedef struct {
    const REAL *by_multiplied; /* may be the same memory as by_weight */
    const REAL *by_factor, *by_offset; /* of f where there is no layer */
    REAL *by_weight;
    REAL *by_mean, *by_var; /* one value a channel of the input, a part from each block: to be summed */
    REAL *by_gamma, *by_beta;
    int64_t reach; /* from one block's part to the next */
    int64_t turned; /* whether by_weight has the taps of a filter inside its inputs where all else has them outside */
} NAME(gradients);

/* Scales of `count` sites, or, with `gradients`, their gradients. Returns 0, or 1 without memory. */
int NAME(scales)(
    const NAME(site) *sites, const NAME(gradients) *gradients, int64_t count, parallel_t parallel, int64_t threads);
