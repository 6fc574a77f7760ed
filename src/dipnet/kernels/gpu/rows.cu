// Products of kept output rows: what each kept unit's weights and x sum up to. Compiled at run time,
// one variant a call's kind.
//
// Macros: KIND of the weights, X of x, ADDED of bias and factor, OUT of what is written: as in
// numbers.cuh; MATRICES 1, or 2 for gate and up; BLOCK units of an index; ACTIVATION, the FUNCTION of
// numbers.cuh; THREADS of a block, LANES of them side by side in a unit; UNITS that a thread reads
// side by side, READS runs of 16 bytes of each that it asks for before it multiplies the first;
// RESIDENT blocks that a multiprocessor holds at least, which leaves the registers for them.
//
// A block has the next SIDES * UNITS places of the list. Sums stay in registers; those of a unit's
// threads are added in their order: always the same numbers.

#include "numbers.cuh"

typedef Stored<X>::Number Number;
typedef Stored<ADDED>::Number Added;
typedef Stored<OUT>::Number Out;

#define WEIGHTS (KIND == 2 ? 4 : 8)  // of a run of 16 bytes
#define X_WORDS (WEIGHTS * (X == 2 ? 4 : 2) / 4)
#define SIDES (THREADS / LANES)
#define PLACES (SIDES * UNITS)  // of a block
#define WARPS (LANES > 32 ? LANES / 32 : 1)  // that share a unit
#define ALL 0xffffffffu

// The numbers of x that a run of weights is multiplied with.
__device__ void read_x(const Number* at, bool valid, u32* words) {
    typedef u32 Words[X_WORDS < 4 ? 2 : 4];
    const u32 each = sizeof(Words) / 4;
#pragma unroll
    for (u32 i = 0; i < X_WORDS; i += each)
        read_often((const u32*)at + i, valid, *(Words*)(words + i));
}

// Add up what the threads of a unit have of it.
__device__ void share_sum(float total, float* sums) {
#pragma unroll
    for (u32 step = 1; step < (LANES < 32 ? LANES : 32); step *= 2)
        total += __shfl_xor_sync(ALL, total, step);
    const u32 lane = threadIdx.x % LANES;
    if (lane % 32 == 0) sums[lane / 32] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
multiply_rows(const Number* x, const int* index, const int* count, const unsigned char* weight,
              const unsigned char* up, const Added* bias, const Added* factor, Out* out, int kept,
              int width, int index_stride, int weight_stride, int factor_stride) {
    __shared__ float sums[MATRICES][PLACES][WARPS];
    const u32 row = blockIdx.y, side = threadIdx.x / LANES;
    const int first = blockIdx.x * PLACES;

    wait_for_previous();
    let_next_come();
    x += (size_t)row * width;
    index += (size_t)row * index_stride;
    const int end = count ? min(kept, count[index_stride ? row : 0] * BLOCK) : kept;

    const unsigned char* units[MATRICES][UNITS];
    bool valid[UNITS];
#pragma unroll
    for (u32 i = 0; i < UNITS; i++) {
        const int place = first + side * UNITS + i;
        valid[i] = place < end;
        const u32 unit = read_word(index + place / BLOCK, valid[i]) * BLOCK + place % BLOCK;
        units[0][i] = weight + (size_t)unit * weight_stride;
        if (MATRICES == 2) units[MATRICES - 1][i] = up + (size_t)unit * weight_stride;
    }

    float totals[MATRICES][UNITS] = {};
    const int own_width = first < end ? width : 0;  // blocks behind the valid places read nothing
    for (int begin = threadIdx.x % LANES * WEIGHTS; begin < own_width;
         begin += LANES * WEIGHTS * READS) {
        u32 words[READS][MATRICES][UNITS][4], x_words[READS][X_WORDS];
#pragma unroll
        for (u32 read = 0; read < READS; read++) {  // all on their way before one is needed
            const int at = begin + read * LANES * WEIGHTS;
#pragma unroll
            for (u32 i = 0; i < MATRICES * UNITS; i++)
                read_once(units[i / UNITS][i % UNITS] + at * (16 / WEIGHTS),
                          valid[i % UNITS] && at < width, words[read][i / UNITS][i % UNITS]);
            read_x(x + at, at < width, x_words[read]);
        }
#pragma unroll
        for (u32 read = 0; read < READS; read++)
#pragma unroll
            for (u32 i = 0; i < MATRICES * UNITS; i++)
#pragma unroll
                for (u32 at = 0; at < WEIGHTS; at++)
                    totals[i / UNITS][i % UNITS] += number_in<X>(x_words[read], at) *
                        number_in<KIND>(words[read][i / UNITS][i % UNITS], at);
    }

#pragma unroll
    for (u32 i = 0; i < MATRICES * UNITS; i++)
        share_sum(totals[i / UNITS][i % UNITS], sums[i / UNITS][side * UNITS + i % UNITS]);
    __syncthreads();
    for (u32 own = threadIdx.x; own < PLACES; own += THREADS) {
        const int place = first + own;
        if (place >= kept) return;
        const u32 unit = read_word(index + place / BLOCK, place < end) * BLOCK + place % BLOCK;
        float total = 0, raised = 0;
#pragma unroll
        for (u32 warp = 0; warp < WARPS; warp++) {
            total += sums[0][own][warp];
            if (MATRICES == 2) raised += sums[MATRICES - 1][own][warp];
        }
        if (bias) total += number<ADDED>(bias[unit]);
        total = activated<ACTIVATION>(total);
        if (MATRICES == 2) total *= raised;
        if (factor) total *= number<ADDED>(factor[(size_t)row * factor_stride + unit]);
        out[(size_t)row * kept + place] = rounded<OUT>(place < end ? total : 0);
    }
}
