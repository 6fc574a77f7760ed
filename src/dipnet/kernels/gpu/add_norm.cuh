// What select_units selects among with NORM: the sum of a token's residual stream and what is added
// to it, normalised by its root mean square, rounded to Score wherever _add_norm of steps/norms.py
// rounds. Every thread keeps the scores that it makes. The sums' order is this kernel's own.

__device__ Score rounded(float value) { return rounded<KIND>(value); }

__device__ float sum_in_warp(float value) {
    for (u32 step = 16; step; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// The sum over all blocks of the cluster, the same in all their threads. What has arrived before
// waits here, and arrives again.
__device__ float sum_of_all(float value, Shared& shared, u32 thread) {
    u32 lane = thread % 32;
    value = sum_in_warp(value);
    if (lane == 0) shared.sums[thread / 32] = value;
    __syncthreads();
    value = sum_in_warp(lane < WARPS ? shared.sums[lane] : 0.0f);
#if BLOCKS > 1
    wait();
    if (thread < BLOCKS)
        set_in_block((u32*)&shared.sum_of[blockIdx.x], thread, __float_as_uint(value));
    arrive();
    wait();
    value = 0;
    for (u32 block = 0; block < BLOCKS; block++) value += shared.sum_of[block];
    arrive();
#endif
    return value;
}

// Makes `own` the normalised sum times `weight`, and writes it, and the sum where there is a delta.
__device__ void add_norm(const Score* hidden, const Score* delta, const Score* weight,
                         Score* summed, Score* normed, float epsilon, u32 begin, u32 n, Score* own,
                         Shared& shared, u32 thread) {
    read_scores(hidden, begin, n, own);
    if (delta) {
        alignas(16) Score added[EACH];
        read_scores(delta, begin, n, added);
        for (u32 i = 0; i < EACH; i++) own[i] = rounded(number(own[i]) + number(added[i]));
        write_scores(summed, begin, n, own);
    }
    float squares = 0;
    for (u32 i = 0; i < EACH; i++)
        if (begin + i < n) squares += number(own[i]) * number(own[i]);
    float scale = rsqrtf(sum_of_all(squares, shared, thread) / n + epsilon);
    for (u32 i = 0; i < EACH; i++)  // rounded before the weights, as Hugging Face does
        own[i] = rounded(number(rounded(number(own[i]) * scale)) * number(weight[i]));
    write_scores(normed, begin, n, own);
}
