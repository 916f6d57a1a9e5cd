// Compile-time sizes of the decode and prefill kernels, by type. worker_orcd/cuda/layout.py computes the same numbers
// for the launches, and a test compares the two on the CPU.
#pragma once

#include "quant/types.cuh"

// Shared memory that a block may have with compute capability 9.0.
constexpr int kMaxSmem = 232448;

// Row tiles of a warp that decode_<type>_128e decodes into registers before its input is there: what there are for.
template <class Q>
constexpr int kEarlyTiles = Q::kHasMin || Q::kLowBits == 8 || kRowScaled<Q> ? 1 : 2;

// One decode kernel: how a warp's ring is cut (worker_orcd/cuda/layout.py, matvec_shape).
template <class Q, int kTiles>
struct MatvecShape {
    static constexpr int kStageKTiles = Q::kTileK == 64 && !kDense<Q> ? 2 : 1;
    static constexpr int kStageBytes = kStageKTiles * Q::kPackedTileBytes;
    // Two row tiles share the loads of x where the ring and, with 8 tiles, the registers allow.
    static constexpr bool kTwoFit = kTiles == 4 || (Q::kTileK == 64 && !std::is_same_v<Q, Q5_1>);
    static constexpr int kRowTiles = kTiles >= 4 && kStageBytes <= 2304 && kTwoFit ? 2 : 1;
    static constexpr int kSlotBytes = kRowTiles * kStageBytes;
    static constexpr int kFit = 10240 / kSlotBytes;
    static constexpr int kDepth = kFit < 2 ? 2 : kFit > 4 ? 4 : kFit;
    static constexpr int kSums = kRowTiles * 128;  // float32 partial sums of a warp for 8 rows of x
};

// The stage after `stage` of a warp: the next of its chunk, else the first of its next chunk.
HOST_DEVICE int next_stage(int stage, int chunk_stages, int n_warps) {
    ++stage;
    return stage % chunk_stages ? stage : stage + (n_warps - 1) * chunk_stages;
}

// One prefill kernel: its block tile and stages (worker_orcd/cuda/layout.py, matmul_stages).
template <class Q, int kWarpsM_, int kWarpsN_, int kTiles_>
struct MatmulShape {
    static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kTiles = kTiles_;
    static constexpr int kWarps = kWarpsM * kWarpsN;
    static constexpr int kRowTiles = 2 * kWarpsM;       // row tiles of a block
    static constexpr int kRows = 8 * kTiles * kWarpsN;  // rows of x of a block
    static constexpr int kRowStep = 4 * kWarps;         // rows of x that all threads copy at once, 16 bytes each
    static constexpr int kCopies = kRows / kRowStep;    // of x by one thread, per stage
    static constexpr int kXBytes = kRows * 2 * kSubK;   // one stage of x: 64 columns
    static constexpr int kWBytes = kRowTiles * Q::kPackedTileBytes;
    static constexpr int kBudget = kWarpsN == 1 ? 75776 : 49152;  // three or four blocks to a multiprocessor
    static constexpr int slots(int stages) { return Q::kSubs > 1 ? 2 : stages; }
    static constexpr int bytes(int stages) { return stages * kXBytes + slots(stages) * kWBytes; }
    static constexpr int kStages = bytes(4) <= kBudget ? 4 : bytes(3) <= kBudget ? 3 : 2;
    // A packed tile of several sub-tiles arrives with the stage of its first one. That is at most kStages - 1 stages
    // early, which is less than kSubs, so the packed tile two before it is done with: two slots suffice.
    static constexpr int kSlots = slots(kStages);
    static constexpr int kBytes = bytes(kStages);  // of stages and slots; factors follow
    static_assert(Q::kSubs == 1 || kStages <= Q::kSubs);
};

// One kernel of products with many rows (common/many_rows.cuh): its tile, its rings and its warps
// (worker_orcd/cuda/layout.py, many_rows_rings). kGathers: rows of x are gathered, by four warps. kWidth: of a tile
// with fewer than kN rows the products are of so many fewer, as often as 64 are left.
template <class Q, int kM_, int kK_, int kN_, bool kGathers_ = false, int kWidth_ = kN_>
struct ManyRowsShape {
    static constexpr int kM = kM_, kK = kK_, kN = kN_, kWidth = kWidth_;
    static constexpr bool kGathers = kGathers_;
    static constexpr int kGroups = kM * kK, kWarps = 4 * kGroups, kRowTiles = 4 * kM;
    static constexpr int kXSuppliers = kGathers ? 4 : 1;                // warps that bring x of a part,
    static constexpr int kWSuppliers = kGathers ? 4 : kK == 1 ? 3 : 1;  // and its weights
    static constexpr int kXArrivals = kGathers ? 32 * kXSuppliers : 1;
    static constexpr int kThreads = 32 * (kWarps + kK * (kXSuppliers + kWSuppliers));
    static constexpr int kUnitTiles = kDense<Q> ? 1 : 256 / Q::kTileK;  // packed tiles that come at once, at most
    static constexpr int kUnitBytes = kUnitTiles * Q::kPackedTileBytes;
    static constexpr int kXBytes = 128 * kN;
    static constexpr int kXSlotBytes = kXBytes + (4 * kN + 1023) / 1024 * 1024;
    static constexpr int kSumBytes = kK > 1 ? 256 * kM * kN : 0;
    static constexpr int kExchangeBytes = kWarps / 2 * 4096;
    static constexpr int kRoom = kMaxSmem - kSumBytes - kExchangeBytes - 1024;
    static constexpr int w_bytes(int depth) { return depth * kK * kRowTiles * kUnitBytes; }
    static constexpr int x_depth(int w_depth) { return (kRoom - w_bytes(w_depth)) / (kK * kXSlotBytes); }
    static constexpr int kWDepth = x_depth(4) >= 6 ? 4 : x_depth(3) >= 4 ? 3 : 2;
    static constexpr int kXDepth = x_depth(kWDepth) > 8 ? 8 : x_depth(kWDepth);
    static_assert(kXDepth >= 2);
    static constexpr int kWAt = kK * kXDepth * kXSlotBytes, kSumsAt = kWAt + w_bytes(kWDepth);
    static constexpr int kExchangeAt = kSumsAt + kSumBytes, kBarriersAt = kExchangeAt + kExchangeBytes;
    static_assert(kExchangeAt % 128 == 0);
    static constexpr int kPartBarriers = 2 * (kXDepth + kWDepth);
    static constexpr int kBytes = kBarriersAt + 8 * kK * kPartBarriers;
    static constexpr int kFirstPairBarrier = 1 + (kK > 1 ? kGroups : 0);  // of those that group_sync knows
    // Registers of the threads that multiply and of the others: together those that a block has at its start.
    static constexpr int kGroupRegisters = kGroups == 2 ? 240 : kGroups == 3 ? 144 : 104;
    static constexpr int kSupplierRegisters = kGroups == 2 ? 24 : kGroups == 3 ? 80 : 32;
    // Sets of fragments: two where beside kN sums there is room for them.
    static constexpr int kSets = kGroupRegisters >= kN + 72 && !kDense<Q> ? 2 : 1;
};
