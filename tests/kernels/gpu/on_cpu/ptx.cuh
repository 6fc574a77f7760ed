// What kernels in CUDA C++ need to run on a CPU: in the place of kernels/gpu/ptx.cuh, and of what a
// compiler of CUDA brings along.
//
// A cluster runs at a time. Its blocks are threads of the CPU, whose own variables stand for shared
// memory; a block's threads are fibers, which go on in turn wherever one of them waits.

#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
struct uint2 { u32 x, y; };
struct float4 { float x, y, z, w; };

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static thread_local

namespace on_cpu {

struct Place { u32 x, y; };

struct Meeting { u32 arrived = 0, passed = 0; };

struct Cluster {
    std::atomic<u32> arrived = 0, passed = 0, begun = 0;
    u32 blocks;
    std::vector<char*> anchors;  // where each block's shared memory lies
};

struct Block {
    std::vector<ucontext_t> threads;
    std::vector<std::vector<char>> stacks;
    std::vector<bool> ended;
    std::vector<Meeting> warps;
    std::vector<u32> given, awaited;
    Meeting all;
    ucontext_t scheduler;
    u32 running = 0;
};

const size_t STACK = 1 << 16;
const u32 PATIENCE = 1 << 20;  // turns of all threads until a wait is one in vain
static Cluster* cluster;
static thread_local Block* current;
static thread_local char anchor;

inline void go_on() { swapcontext(&current->threads[current->running], &current->scheduler); }

inline void meet(Meeting& meeting, u32 members) {
    const u32 passed = meeting.passed;
    if (++meeting.arrived == members) meeting.arrived = 0, meeting.passed++;
    else while (meeting.passed == passed) go_on();
}

// What each lane of the warp gives, for `read` to look at.
template <typename Read>
auto among_lanes(u32 value, Read read) {
    Meeting& warp = current->warps[current->running / 32];
    current->given[current->running] = value;
    meet(warp, 32);
    auto made = read(current->given.data() + current->running / 32 * 32, current->running % 32);
    meet(warp, 32);
    return made;
}

template <typename T>
T of_lane(T value, u32 from) {
    u32 bits, there;
    std::memcpy(&bits, &value, 4);
    there = among_lanes(bits, [&](const u32* lanes, u32) { return lanes[from % 32]; });
    std::memcpy(&value, &there, 4);
    return value;
}

}  // namespace on_cpu

static thread_local on_cpu::Place threadIdx, blockIdx;
using std::min;

inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline u32 __float_as_uint(float value) { u32 bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(u32 bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline u32 __popc(u32 bits) { return __builtin_popcount(bits); }
inline u32 __ffs(u32 bits) { return __builtin_ffs(bits); }
inline u32 atomicAdd(u32* at, u32 value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }

inline void __syncthreads() { on_cpu::meet(on_cpu::current->all, on_cpu::current->threads.size()); }

template <typename T>
T __shfl_sync(u32, T value, u32 from) { return on_cpu::of_lane(value, from); }

template <typename T>
T __shfl_xor_sync(u32, T value, u32 step) { return on_cpu::of_lane(value, threadIdx.x % 32 ^ step); }

template <typename T>
T __shfl_up_sync(u32, T value, u32 step) {
    const u32 lane = threadIdx.x % 32;
    return on_cpu::of_lane(value, lane < step ? lane : lane - step);
}

inline u32 __reduce_add_sync(u32, u32 value) {
    return on_cpu::among_lanes(value, [](const u32* lanes, u32) {
        u32 sum = 0;
        for (u32 i = 0; i < 32; i++) sum += lanes[i];
        return sum;
    });
}

inline u32 __ballot_sync(u32, bool value) {
    return on_cpu::among_lanes(value, [](const u32* lanes, u32) {
        u32 bits = 0;
        for (u32 i = 0; i < 32; i++) bits |= lanes[i] << i;
        return bits;
    });
}

inline void wait_for_previous() {}
inline void let_next_come() {}

inline void arrive_in_cluster() {
    on_cpu::Cluster& all = *on_cpu::cluster;
    on_cpu::Block& block = *on_cpu::current;
    block.awaited[block.running] = all.passed;
    if (++all.arrived == all.blocks * block.threads.size()) all.arrived = 0, all.passed++;
}

inline void arrive_empty_in_cluster() { arrive_in_cluster(); }

inline void wait_in_cluster() {
    const u32 awaited = on_cpu::current->awaited[on_cpu::current->running];
    while (on_cpu::cluster->passed == awaited) on_cpu::go_on();
}

template <typename T>
T* in_block(T* address, u32 block) {
    const char* there = on_cpu::cluster->anchors.at(block);
    return (T*)(there + ((const char*)address - &on_cpu::anchor));
}

inline void add_in_block(u32* address, u32 block, u32 value) {
    atomicAdd(in_block(address, block), value);
}

template <typename T>
void set_in_block(T* address, u32 block, T value) { *in_block(address, block) = value; }

inline u32 read_in_block(const u32* address, u32 block) { return *in_block(address, block); }

inline float of_half(u16 bits) { _Float16 value; std::memcpy(&value, &bits, 2); return value; }

inline u16 to_half(float number) {
    const _Float16 value = number;
    u16 bits;
    std::memcpy(&bits, &value, 2);
    return bits;
}

inline u16 to_bfloat(float value) {
    const u32 bits = __float_as_uint(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename T>
T read_or_zero(const void* at, bool valid) {
    T read{};
    if (valid) std::memcpy(&read, at, sizeof read);
    return read;
}

template <u32 WORDS_READ>
void read_once(const unsigned char* at, bool valid, u32 (&words)[WORDS_READ]) {
    for (u32 i = 0; i < WORDS_READ; i++) words[i] = read_or_zero<u32>(at + 4 * i, valid);
}

template <u32 WORDS_READ>
void read_often(const void* at, bool valid, u32 (&words)[WORDS_READ]) {
    read_once((const unsigned char*)at, valid, words);
}

inline u32 read_word(const void* at, bool valid) { return read_or_zero<u32>(at, valid); }
inline u16 read_short(const void* at, bool valid) { return read_or_zero<u16>(at, valid); }
inline u32 read_byte(const void* at, bool valid) { return read_or_zero<unsigned char>(at, valid); }
