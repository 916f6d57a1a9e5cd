// Parameters of the routing kernels (route.cu). Plain C. Sizes are in elements, strides in elements of the row's type
// unless the name says bytes.
//
// A pair is a row and one of its slots: number row * n_used + slot, rows counted from the launch's first.
#ifndef WORKER_ORCD_ROUTE_PARAMS_H
#define WORKER_ORCD_ROUTE_PARAMS_H

#include <stdint.h>

#include "params/convert_params.h"

// Most experts of a layer, and most of them that a row uses.
#define EXPERTS_MAX 256
#define EXPERTS_USED_MAX 32
// Parts of K whose sums a router logit is added up from, in order.
#define ROUTE_SLICES 16
// Rows of x that one warp of route_logits takes together.
#define ROUTE_ROWS 4
// Most rows whose experts one block of route_choose chooses, and makes the list; and most decode rows that are not
// taken for prefill rows.
#define ROUTE_CHOOSE_ROWS 64
// Rows of one warp of route_few.
#define ROUTE_FEW_ROWS 2
// Most pairs of one expert that a decode block takes together.
#define EXPERT_DECODE_ROWS 16

// Pairs at places [first, first + n) of the list, all of one expert.
typedef struct {
    int32_t expert;
    int32_t first;
    int32_t n;
    int32_t unused;
} ExpertItem;

// Which pairs each expert has: written by the routing kernels, read by the products. With `places` the first place of
// each item is a multiple of 8 (those left over are nobody's), and an expert's items have about as many pairs each.
typedef struct {
    int32_t* n_items;
    ExpertItem* items;  // [*n_items], by expert; 16-byte aligned
    int32_t* pairs;     // the pair at each place: pair numbers by expert, ascending within one
    int32_t* places;    // [n_rows * n_used] the place of each pair, or null
} ExpertList;

// route_logits_<type>, route_choose, route_list.
typedef struct {
    const float* x;            // [n_rows, x_stride]; 16-byte aligned rows
    const float* norm_weight;  // [k] of the RMS norm before, 16-byte aligned, or null
    const float* roots;        // [n_rows] 1 / root of that norm, or null
    const uint8_t* w;          // repacked [n_expert, k]
    const float* bias;         // [n_expert] or null
    float* partial;            // [n_rows, ROUTE_SLICES, n_expert rounded up to 16]
    float* ids;                // [n_rows, n_used] whole numbers
    float* gates;              // [n_rows, n_used]
    int64_t x_stride;
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_expert;
    int32_t n_used;
    int32_t n_rows;
    int32_t item_rows;  // most pairs of an item, a multiple of 8; route_choose with 0 makes no list
    ExpertList list;
} RouteParams;

// route_few_<type>: all of that for 1 to 8 rows, and their conversion. Grid n_logit_blocks + n_rows, block 256, dynamic
// shared memory 8 * slice_bytes. Each ROUTE_FEW_ROWS rows have as many blocks of logits.
typedef struct {
    RouteParams route;      // `roots` are those that the conversion leaves
    ConvertParams convert;  // of the same rows
    uint32_t* arrived;      // 0 between launches
    int32_t n_logit_blocks;
    int32_t slice_bytes;  // of the packed tiles of a part of K of a row tile, at most
} RouteFewParams;

#endif
