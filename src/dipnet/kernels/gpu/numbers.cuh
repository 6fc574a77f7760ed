// Floating numbers in memory, by the CODE of their kind: 0 float16, 1 bfloat16, 2 float32; and what
// becomes of a sum.

#include "ptx.cuh"

template <u32 CODE> struct Stored { typedef u16 Number; };
template <> struct Stored<2> { typedef float Number; };

template <u32 CODE>
__device__ float number(typename Stored<CODE>::Number stored) {
    if constexpr (CODE == 2) return stored;
    else if constexpr (CODE == 1) return __uint_as_float((u32)stored << 16);
    else return of_half(stored);
}

template <u32 CODE>
__device__ typename Stored<CODE>::Number rounded(float value) {
    if constexpr (CODE == 2) return value;
    else if constexpr (CODE == 1) return to_bfloat(value);
    else return to_half(value);
}

// 0 where it is not `valid`.
template <u32 CODE>
__device__ float read_number(const typename Stored<CODE>::Number* at, bool valid) {
    if constexpr (CODE == 2) return __uint_as_float(read_word(at, valid));
    else return number<CODE>(read_short(at, valid));
}

// The `at`-th number of some words.
template <u32 CODE>
__device__ float number_in(const u32* words, u32 at) {
    const u32 word = words[CODE == 2 ? at : at / 2];
    if constexpr (CODE == 2) return __uint_as_float(word);
    else if constexpr (CODE == 1) return __uint_as_float(at % 2 ? word & 0xffff0000u : word << 16);
    else return of_half(at % 2 ? word >> 16 : word & 0xffffu);
}

// FUNCTION: 0 none, 1 relu, 2 silu, 3 gelu, 4 gelu_tanh. NaN stays NaN.
template <u32 FUNCTION>
__device__ float activated(float value) {
    if (FUNCTION == 1) return value < 0 ? 0 : value;
    if (FUNCTION == 2) return value / (1 + expf(-value));
    if (FUNCTION == 3) return 0.5f * value * (1 + erff(value * 0.7071067811865476f));
    if (FUNCTION == 4) {
        const float inner = 0.7978845608028654f * (value + 0.044715f * value * value * value);
        return value / (1 + expf(-2 * inner));
    }
    return value;
}
