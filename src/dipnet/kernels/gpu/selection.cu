// Selection of units by a cluster of thread blocks: exactly k highest scores, or all above a
// threshold; indices in ascending order, a mask, or the scores times the mask. Compiled at run time,
// one variant a call's kind.
//
// Macros: KIND of the scores (numbers.cuh); MAGNITUDE, FACTOR, ABOVE, MASK, KEPT, VECTOR, NORM
// (the scores are made here: add_norm.cuh) 0 or 1; BLOCKS of the cluster, THREADS of a block, EACH
// scores of a thread.
//
// A score becomes an unsigned key in the scores' order; 0 is the key of no score. The k-th highest key
// is found digit by digit: every block counts the values of a digit among the keys that share the
// digits found so far, and adds its counts to those of every block, so that all know the next digit.
// Counts are integers: their order does not matter. Thread t of block b holds EACH neighbouring
// scores, so that places follow from counts of what lies before.

#include "numbers.cuh"

#if KIND == 2 || FACTOR
#define WIDE 1
#define FIRST_BITS (MAGNITUDE ? 10 : 11)
#define DIGITS 4
#else
#define WIDE 0
#define FIRST_BITS (MAGNITUDE ? 10 : 11)
#define DIGITS 2
#endif
#define MIDDLE_BITS 8
#define LAST_BITS 5
#define FIRST_BINS (1 << FIRST_BITS)
#define MIDDLE_BINS (1 << MIDDLE_BITS)
#define LAST_BINS (1 << LAST_BITS)
#define KEY_BITS (FIRST_BITS + LAST_BITS + (DIGITS - 2) * MIDDLE_BITS)
#define WARPS (THREADS / 32)
#define SPREAD (BLOCKS > 8)  // each block sums some of the bins: fewer writes than to all, reads later
#define ALL 0xffffffffu

typedef Stored<KIND>::Number Score;

#if BLOCKS > 1
#define CLUSTER __cluster_dims__(BLOCKS, 1, 1)
#else
#define CLUSTER
#endif

// All blocks of the cluster arrive, and wait for each other; what they wrote before is there after.
__device__ void arrive() {
    if (BLOCKS > 1) arrive_in_cluster();
}

__device__ void wait() {
    if (BLOCKS > 1) wait_in_cluster();
}

__device__ float number(Score score) { return number<KIND>(score); }

// All NaN have one key, the highest; both zeros have one.
__device__ u32 key_of_float(float value) {
    u32 bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
    if (MAGNITUDE) return min(magnitude, 0x7f800001u) + 1;
    if (magnitude > 0x7f800000u) return 0xffffffffu;
    if (magnitude == 0) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ u32 key_of_short(u16 score) {
    const u32 infinity = KIND == 1 ? 0x7f80u : 0x7c00u;
    u32 bits = score, magnitude = bits & 0x7fffu;
    if (MAGNITUDE) return min(magnitude, infinity + 1) + 1;
    if (magnitude > infinity) return 0xffffu;
    if (magnitude == 0) bits = 0;
    return bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
}

// A dropped score times 0: NaN where it is no finite number.
__device__ Score dropped(Score score) {
#if KIND == 2
    return score * 0.0f;
#else
    const u32 infinity = KIND == 1 ? 0x7f80u : 0x7c00u;
    return (score & 0x7fffu) >= infinity ? 0x7fffu : 0u;
#endif
}

__device__ u32 inclusive_in_warp(u32 value, u32 lane) {
    for (u32 step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// The sum of the values of all threads before this one; `totals` is WARPS wide and not in use.
__device__ u32 before_in_block(u32 value, u32* totals, u32 lane, u32 warp) {
    u32 inclusive = inclusive_in_warp(value, lane);
    if (lane == 31) totals[warp] = inclusive;
    __syncthreads();
    u32 total = lane < WARPS ? totals[lane] : 0;
    u32 until = inclusive_in_warp(total, lane);
    u32 earlier = __shfl_sync(ALL, until, warp ? warp - 1 : 0);
    return inclusive - value + (warp ? earlier : 0);
}

// Counts of this block, and of all blocks.
template <u32 SIZE>
struct Bins {
    u32 own[BLOCKS > 1 ? SIZE : 1], all[SIZE];

    __device__ void clear(u32 thread) {
        for (u32 i = thread; i < SIZE; i += THREADS) all[i] = 0;
        if (BLOCKS > 1)
            for (u32 i = thread; i < SIZE; i += THREADS) own[i] = 0;
    }

    __device__ void count(u32 bin) { atomicAdd(BLOCKS > 1 ? &own[bin] : &all[bin], 1u); }

    // Add this block's counts to those of all; the caller waits for the other blocks.
    __device__ void share(u32 thread) {
        __syncthreads();
        if (BLOCKS == 1) return;
        for (u32 i = thread; i < SIZE; i += THREADS)
            if (u32 counted = own[i])
                for (u32 block = 0; block < (SPREAD ? 1 : BLOCKS); block++)
                    add_in_block(&all[i], SPREAD ? owner(i) : block, counted);
    }

    __device__ u32 owner(u32 bin) const { return bin / (SIZE / BLOCKS); }

    __device__ u32 of_all(u32 bin) const {
        return SPREAD ? read_in_block(&all[bin], owner(bin)) : all[bin];
    }
};

struct Shared {
    Bins<FIRST_BINS> first;
    Bins<MIDDLE_BINS> middle[DIGITS - 1];
    u32 last[LAST_BINS], last_of[BLOCKS][LAST_BINS];  // of this block, of each block
    u32 above, above_of[BLOCKS];                      // keys above those that share all digits but one
    u32 totals[4][WARPS];
    u32 digit, wanted;
    float sums[WARPS], sum_of[BLOCKS];
};

__device__ void write_scores(Score* scores, u32 begin, u32 n, const Score* own) {
#if VECTOR
    if (begin < n) {
        uint2* to = (uint2*)(scores + begin);
        for (u32 i = 0; i < EACH * sizeof(Score) / 8; i++) to[i] = ((const uint2*)own)[i];
    }
#else
    for (u32 i = 0; i < EACH; i++)
        if (begin + i < n) scores[begin + i] = own[i];
#endif
}

__device__ void read_scores(const Score* scores, u32 begin, u32 n, Score* own) {
#if VECTOR
    if (begin < n) {
        const uint2* from = (const uint2*)(scores + begin);
        for (u32 i = 0; i < EACH * sizeof(Score) / 8; i++) ((uint2*)own)[i] = from[i];
    }
#else
    for (u32 i = 0; i < EACH; i++) own[i] = begin + i < n ? scores[begin + i] : Score(0);
#endif
}

#if NORM
#include "add_norm.cuh"
#endif

// Find the next digit: the highest bin that `wanted` keys reach, counted from above. Sets
// shared.digit and shared.wanted, the keys still wanted inside that bin.
template <u32 SIZE>
__device__ void find_digit(Shared& shared, const Bins<SIZE>& bins, u32 wanted, u32* totals,
                           u32 thread) {
    const u32 most = SIZE > THREADS ? SIZE / THREADS : 1;
    u32 counts[most], sum = 0;
    for (u32 i = 0; i < most; i++) {
        u32 place = thread * most + i;
        counts[i] = place < SIZE ? bins.of_all(SIZE - 1 - place) : 0;
        sum += counts[i];
    }
    u32 before = before_in_block(sum, totals, thread % 32, thread / 32);
    for (u32 i = 0; i < most; i++) {
        if (before < wanted && wanted <= before + counts[i]) {
            shared.digit = SIZE - 1 - (thread * most + i);
            shared.wanted = wanted - before;
        }
        before += counts[i];
    }
    __syncthreads();
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS)
select_units(const Score* scores, const float* factor, const float* threshold, int* index,
             int* count, unsigned char* mask, Score* kept_scores, int n_given, int k
#if NORM
             , const Score* delta, const Score* weight, Score* summed, Score* normed, float epsilon
#endif
) {
    __shared__ Shared shared;
    const u32 n = n_given, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const u32 block = blockIdx.x, row = blockIdx.y;
    const u32 begin = (block * THREADS + thread) * EACH;

    let_next_come();
#if !ABOVE
    shared.first.clear(thread);
    for (u32 i = 0; i + 2 < DIGITS; i++) shared.middle[i].clear(thread);
    if (thread < LAST_BINS) shared.last[thread] = 0;
    if (thread == 0) shared.above = 0;
#endif
#if NORM
    alignas(16) Score own_weight[EACH];
    read_scores(weight, begin, n, own_weight);
#endif
    arrive();
    __syncthreads();
    wait_for_previous();

    alignas(16) Score own[EACH];
    const size_t in_row = (size_t)row * n;
#if NORM
    add_norm(scores + in_row, delta ? delta + in_row : delta, own_weight, summed + in_row,
             normed + in_row, epsilon, begin, n, own, shared, thread);
#else
    read_scores(scores + in_row, begin, n, own);
#endif
    u32 places = 0;  // kept units before this thread's

#if ABOVE
    const float least = *threshold;
    u32 keep = 0;
    for (u32 i = 0; i < EACH; i++) {
        float value = number(own[i]);
        if (MAGNITUDE) value = fabsf(value);
        if (begin + i < n && value > least) keep |= 1u << i;
    }
    places = before_in_block(__popc(keep), shared.totals[0], lane, warp);
    wait();
    if (thread == THREADS - 1)
        for (u32 other = 0; other < BLOCKS; other++)
            if (BLOCKS > 1) set_in_block(&shared.above_of[block], other, places + __popc(keep));
            else shared.above_of[0] = places + __popc(keep);
    arrive();
    wait();
    __syncthreads();
    u32 all = 0;
    for (u32 other = 0; other < BLOCKS; other++) {
        if (other < block) places += shared.above_of[other];
        all += shared.above_of[other];
    }
    if (block == 0 && thread == 0) count[row] = all;
#else
    u32 keys[EACH];
    for (u32 i = 0; i < EACH; i++) {
        keys[i] = 0;
        if (VECTOR ? begin < n : begin + i < n)
#if WIDE
            keys[i] = key_of_float(FACTOR ? number(own[i]) * factor[begin + i] : number(own[i]));
#else
            keys[i] = key_of_short(own[i]);
#endif
        if (keys[i]) shared.first.count(keys[i] >> (KEY_BITS - FIRST_BITS));
    }
    wait();
    shared.first.share(thread);
    arrive();
    wait();
    find_digit<FIRST_BINS>(shared, shared.first, k, shared.totals[0], thread);
    u32 found = shared.digit, wanted = shared.wanted, shift = KEY_BITS - FIRST_BITS;

    for (u32 digit = 0; digit + 2 < DIGITS; digit++) {
        shift -= MIDDLE_BITS;
        Bins<MIDDLE_BINS>& bins = shared.middle[digit];
        for (u32 i = 0; i < EACH; i++)
            if (keys[i] >> (shift + MIDDLE_BITS) == found)
                bins.count(keys[i] >> shift & (MIDDLE_BINS - 1));
        bins.share(thread);
        arrive();
        wait();
        find_digit<MIDDLE_BINS>(shared, bins, wanted, shared.totals[1 + digit], thread);
        found = found << MIDDLE_BITS | shared.digit;
        wanted = shared.wanted;
    }

    // The last digit: every warp finds it by itself, and what the blocks before keep with it.
    u32 above = 0;
    for (u32 i = 0; i < EACH; i++) {
        u32 start = keys[i] >> LAST_BITS;
        above += start > found;
        if (start == found) atomicAdd(&shared.last[keys[i] & (LAST_BINS - 1)], 1u);
    }
    const u32(*last_of)[LAST_BINS] = shared.last_of;
    if (BLOCKS > 1) {
        above = __reduce_add_sync(ALL, above);
        if (lane == 0) atomicAdd(&shared.above, above);
        __syncthreads();
        for (u32 other = warp; other < BLOCKS; other += WARPS) {
            set_in_block(&shared.last_of[block][lane], other, shared.last[lane]);
            if (lane == 0) set_in_block(&shared.above_of[block], other, shared.above);
        }
        arrive();
        wait();
    } else {
        __syncthreads();
        last_of = &shared.last;
    }
    u32 bin = LAST_BINS - 1 - lane, earlier = 0, in_bin = 0;
    for (u32 other = 0; other < BLOCKS; other++) {
        u32 there = last_of[other][bin];
        if (other < block) earlier += there, places += shared.above_of[other];
        in_bin += there;
    }
    u32 until = inclusive_in_warp(in_bin, lane);
    u32 at = __ffs(__ballot_sync(ALL, until >= wanted)) - 1;  // the lane whose bin is the last digit
    places += __reduce_add_sync(ALL, lane < at ? earlier : 0);
    u32 ties_before = __shfl_sync(ALL, earlier, at);
    u32 quota = wanted - __shfl_sync(ALL, until - in_bin, at);
    u32 last = found << LAST_BITS | (LAST_BINS - 1 - at);

    u32 both = 0;  // keys above the last one in the upper half, ties in the lower: no more than 2^15
    for (u32 i = 0; i < EACH; i++) both += (keys[i] > last) << 16 | (keys[i] == last);
    both = before_in_block(both, shared.totals[3], lane, warp);
    ties_before += both & 0xffffu;
    places += (both >> 16) + min(ties_before, quota);
    int left = (int)(quota - ties_before);  // ties that may still be kept
#endif

    for (u32 i = 0; i < EACH; i++) {
#if ABOVE
        bool kept = keep >> i & 1;
#else
        bool tie = keys[i] == last, kept = keys[i] > last || (tie && left > 0);
        left -= tie;
#endif
        u32 unit = begin + i;
#if MASK
        if (unit < n) mask[in_row + unit] = kept;
#elif KEPT
        if (!kept) own[i] = dropped(own[i]);
#else
        if (kept) index[(size_t)row * (ABOVE ? n : k) + places++] = unit;
#endif
    }
#if KEPT
    write_scores(kept_scores + in_row, begin, n, own);
#endif
}
