// Products of kept input channels by clusters of thread blocks. Compiled at run time, one variant a
// call's kind.
//
// Macros: KIND of the weights: as in numbers.cuh, 3 int8, 4 int4; X of x, bias, residual and out;
// MATRICES 1, or 2 for gate and up; COMPACT 0 or 1; BLOCK units of an index; ACTIVATION, the FUNCTION
// of numbers.cuh; THREADS of a block, LANES of them side by side in a unit (of gate one half, of up
// the other), PARTS of the list, one for each block of a cluster; RESIDENT blocks that a multiprocessor
// holds at least; WORDS of 4 bytes that a thread reads of a unit, READS units that it asks for before
// it multiplies the first.
//
// RESIDENT says how many registers there are for that: left to itself the compiler saves registers,
// and multiplies before all reads are on their way. Sums stay in registers. Those of a block's threads
// meet in its shared memory; then every block of a cluster is given all blocks' sums of some outputs,
// and adds them in the blocks' order: always the same numbers.

#include "numbers.cuh"

typedef Stored<X>::Number Number;

#define INTEGERS (KIND >= 3)
#define BITS (KIND == 4 ? 4 : KIND == 3 ? 8 : KIND == 2 ? 32 : 16)  // of a weight
#define PIECES (32 / BITS)  // weights of a word
#define STEPS (KIND == 4 ? WORDS : (WORDS + 1) / 2)  // multipliers of the words that are read at once
#define OUTPUTS (WORDS * PIECES)
#define COLUMNS (LANES * OUTPUTS)  // of a cluster, of all matrices
#define MADE (COLUMNS / MATRICES)  // outputs of a cluster
#define OWN ((MADE + PARTS - 1) / PARTS)  // outputs that a block finishes
#define SIDES (THREADS / LANES)    // units that the threads of a block read side by side
#define IN_WARP (LANES < 32 ? 32 / LANES : 1)
#define GROUPS (SIDES / IN_WARP)
#define ALL 0xffffffffu

#if PARTS > 1
#define CLUSTER __cluster_dims__(PARTS, 1, 1)
#else
#define CLUSTER
#endif

// An integer's level stays where it is in its word: the 24 lower bits of a float are a multiple of
// 2^-149, without a conversion and at full speed. What is multiplied is 2^64 too large, or products
// would be too small: from 1.8e19 on x times a weight's step gives NaN. Every level is OFFSET too
// high, which is taken off a thread's sum at its end: where x has one sign, that sum is larger than
// what is left, and digits are lost, the more the more units a thread adds up.
#define SHIFT(piece) ((piece) * BITS <= 24 - BITS ? (piece) * BITS : (piece) * BITS - 8)
#define OFFSET (1 << (BITS - 1))
#define RAISED 18446744073709551616.0f  // 2^64

#if INTEGERS
__device__ float level(u32 word, u32 piece) {
    const u32 moved = piece * BITS <= 24 - BITS ? word : word >> 8;
    return __uint_as_float(moved & ((1u << BITS) - 1) << SHIFT(piece));
}

// The sum of weights whose levels gave `total`, of multipliers that sum up to `surplus`.
__device__ float unraised(float total, float surplus, u32 piece) {
    const float unit = 38685626227668133590597632.0f;  // 2^85: 2^149 over RAISED
    return total * (unit / (1 << SHIFT(piece))) - surplus * (OFFSET / RAISED);
}
#endif

// Add `value` times the weights of some words; `steps` are the multipliers of integers.
__device__ void add(float* totals, float* surplus, const u32* words, u32 steps, float value) {
#if !INTEGERS
#pragma unroll
    for (u32 i = 0; i < OUTPUTS; i++) totals[i] += value * number_in<KIND>(words, i);
#else
#pragma unroll
    for (u32 i = 0; i < WORDS; i++) {
        const u32 of = KIND == 4 ? i : i / 2;
        const float step = value * (float)(signed char)(steps >> of * 8 & 0xffu);
        surplus[i] += step;
#pragma unroll
        for (u32 piece = 0; piece < PIECES; piece++)
            totals[i * PIECES + piece] += step * level(words[i], piece);
    }
#endif
}

// The multipliers of the words that are a unit's `vector`-th.
__device__ u32 read_steps(const unsigned char* multipliers, u32 vector, bool valid) {
    const u32 word = vector * WORDS;
    multipliers += KIND == 4 ? word / 16 * 4 + word % 4 : word / 16 * 2 + word % 4 / 2;
    if (STEPS == 4) return read_word(multipliers, valid);
    return STEPS == 2 ? read_short(multipliers, valid) : read_byte(multipliers, valid);
}

// Where the unit has the `at`-th weight of its `vector`-th words (docs/store-format.md).
__device__ u32 place(u32 vector, u32 at) {
    const u32 word = vector * WORDS + at / PIECES, piece = at % PIECES;
    const u32 quad = word % 4, lane = word / 4 % 4;
    if (KIND == 4) return word / 16 * 128 + quad * 32 + lane * 4 + piece / 2 + piece % 2 * 16;
    if (KIND == 3) return word / 16 * 64 + quad * 16 + lane * 4 + piece;
    return word * PIECES + piece;
}

// Say that this block has begun, and wait until all of the cluster have: from then on one may write
// into another's shared memory.
__device__ void say_begun() {
    if (PARTS > 1) arrive_empty_in_cluster();
}

__device__ void wait_begun() {
    if (PARTS > 1) wait_in_cluster();
}

// The blocks of the cluster wait for each other; what they wrote before is there after.
__device__ void meet() {
    if (PARTS == 1) return __syncthreads();
    arrive_in_cluster();
    wait_in_cluster();
}

__device__ void give(float* address, u32 block, float value) {
    if (PARTS > 1) set_in_block(address, block, value);
    else *address = value;
}

// Add up what the threads of this block have of each column, for the block that finishes its output.
__device__ void share_sums(float* totals, float (*partial)[COLUMNS], float (*sums)[PARTS][OWN],
                           u32 part) {
    const u32 thread = threadIdx.x, lane = thread % LANES;
#pragma unroll
    for (u32 i = 0; i < OUTPUTS; i++)
#pragma unroll
        for (u32 step = LANES; step < 32; step *= 2)
            totals[i] += __shfl_xor_sync(ALL, totals[i], step);
    if (thread % (LANES * IN_WARP) < LANES)
        for (u32 i = 0; i < OUTPUTS; i += 4)
            *(float4*)&partial[thread / (LANES * IN_WARP)][lane * OUTPUTS + i] = *(float4*)(totals + i);
    __syncthreads();
    for (u32 column = thread; column < COLUMNS; column += THREADS) {
        float sum = 0;
        for (u32 group = 0; group < GROUPS; group++) sum += partial[group][column];
        const u32 made = column % MADE;
        give(&sums[column / MADE][part][made % OWN], made / OWN, sum);
    }
}

// The next units of a thread.
__device__ void read_units(const int* index, int start, int end, u32* units) {
#pragma unroll
    for (u32 i = 0; i < READS; i++) {
        const int at = start + i * SIDES;
        units[i] = read_word(index + at / BLOCK, at < end) * BLOCK + at % BLOCK;
    }
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, RESIDENT)
multiply_columns(const Number* x, const int* index, const int* count, const unsigned char* weight,
                 const float* scales, const unsigned char* up, const float* up_scales,
                 const Number* bias, const Number* residual, Number* out, int kept, int width,
                 int vectors, int x_stride, int index_stride, int weight_stride, int first) {
    alignas(16) __shared__ float partial[GROUPS][COLUMNS];
    __shared__ float sums[MATRICES][PARTS][OWN];
    const u32 row = blockIdx.y, part = blockIdx.x % PARTS, thread = threadIdx.x;
    const u32 each = LANES / MATRICES, lane = thread % LANES, side = thread / LANES;
    const u32 begin_vector = blockIdx.x / PARTS * each, vector = begin_vector + lane % each;
    const bool inside = vector < vectors;
    if (MATRICES == 2 && lane >= each) weight = up, scales = up_scales;

    say_begun();
    wait_for_previous();
    let_next_come();
    x += (size_t)row * x_stride;
    index += (size_t)row * index_stride;
    if (count) kept = min(kept, count[index_stride ? row : 0] * BLOCK);
    const int share = (kept + PARTS - 1) / PARTS, begin = part * share;
    const int end = min(begin + share, kept), own_end = inside ? end : 0;

    alignas(16) float totals[OUTPUTS] = {};
    float surplus[WORDS] = {};
    u32 units[READS];
    read_units(index, begin + side, own_end, units);
    for (int start = begin; start < end; start += SIDES * READS) {
        u32 words[READS][WORDS], steps[READS] = {};
        float values[READS];
#pragma unroll
        for (u32 i = 0; i < READS; i++) {  // all of them on their way before one is needed
            const int at = start + side + i * SIDES;
            const bool valid = at < own_end;
            const unsigned char* unit = weight + (size_t)units[i] * weight_stride;
            values[i] = read_number<X>(x + (COMPACT ? at : units[i]), valid);
            read_once(unit + vector * WORDS * 4, valid, words[i]);
#if INTEGERS
            steps[i] = read_steps(unit + first, vector, valid);
            values[i] *= RAISED * __uint_as_float(read_word(scales + units[i], valid));
#endif
        }
        read_units(index, start + side + SIDES * READS, own_end, units);
#pragma unroll
        for (u32 i = 0; i < READS; i++) add(totals, surplus, words[i], steps[i], values[i]);
    }

#if INTEGERS
#pragma unroll
    for (u32 i = 0; i < OUTPUTS; i++)
        totals[i] = unraised(totals[i], surplus[i / PIECES], i % PIECES);
#endif
    wait_begun();
    share_sums(totals, partial, sums, part);
    meet();
#pragma unroll 1
    for (u32 own = thread; own < OWN; own += THREADS) {
        const u32 made = part * OWN + own;
        const u32 output = place(begin_vector + made / OUTPUTS, made % OUTPUTS);
        if (made >= MADE || output >= width) continue;
        float total = 0, raised = 0;
#pragma unroll
        for (u32 block = 0; block < PARTS; block++) {
            total += sums[0][block][own];
            if (MATRICES == 2) raised += sums[MATRICES - 1][block][own];
        }
        if (bias) total += number<X>(bias[output]);
        total = activated<ACTIVATION>(total);
        if (MATRICES == 2) total *= raised;
        const size_t at = (size_t)row * width + output;
        if (residual) total += number<X>(residual[at]);
        out[at] = rounded<X>(total);
    }
}
