/* A Gaussian behind a smooth or a piecewise activation, by few nodes. */
#ifndef NORMPROP_CURVES_H
#define NORMPROP_CURVES_H

#include <stdint.h>

enum { PIECEWISE, SIGMOID, TANH, SILU, MISH, SOFTPLUS, EXPONENTIAL, GELU, GELU_TANH };

/* An activation with Gauss-Legendre panels. A piecewise polynomial has one for each piece, from knot to knot; a smooth one two
 * on each side of 0, where it bends. */
typedef struct {
    int64_t kind;
    int64_t panels;
    double a, b, c;          /* SOFTPLUS: β; EXPONENTIAL: scale, α, width */
    double reach;            /* ends of the outer panels, in standard deviations */
    double bend;             /* how far from 0 a smooth one bends */
    double near, far;        /* below near·(|m| + |f(m)|) + far a standard deviation counts as that */
    int64_t kinked;          /* whether f' jumps anywhere but at 0 */
    const int64_t *counts;   /* nodes of each panel */
    const double *places;    /* of nodes between the ends of their panel, in [0, 1], one panel behind the other */
    const double *weights;   /* theirs, times 1/√(2π) */
    const double *knots;     /* panels − 1 of a piecewise one */
    const double *pieces;    /* four numbers each: c₀ + c₁(u − o) + c₂(u − o)² as c₀, c₁, c₂, o */
} curve;

/* Panels have a multiple of NODES_TOGETHER nodes, some without weight, and all together no more than MOST_NODES. */
enum { NODES_TOGETHER = 8, MOST_NODES = 512 };

/* E f, Var f, ∂E/∂m, ∂E/∂v, ∂Var/∂m, ∂Var/∂v for u ~ N(m, v). */
void curve_moments(const curve *c, double m, double v, double *result);

#endif
