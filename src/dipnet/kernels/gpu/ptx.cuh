// What CUDA C++ has no words for. Tests that run the kernels on a CPU put a file of their own in the
// place of this one (tests/kernels/gpu/on_cpu).

typedef unsigned int u32;
typedef unsigned short u16;

// Wait until what the kernel before wrote is there.
__device__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel's blocks may come: they wait by themselves.
__device__ void let_next_come() { asm volatile("griddepcontrol.launch_dependents;"); }

// Barrier of a cluster: what is written before an arrival is there after the wait, in all its blocks.
__device__ void arrive_in_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// The same, where nothing was written.
__device__ void arrive_empty_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }

__device__ void wait_in_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where another block of the cluster has what is at this address of its shared memory.
__device__ u32 in_block(const void* address, u32 block) {
    u32 here = (u32)__cvta_generic_to_shared(address), there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
    return there;
}

__device__ void add_in_block(u32* address, u32 block, u32 value) {
    asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;"
                 ::"r"(in_block(address, block)), "r"(value) : "memory");
}

__device__ void set_in_block(u32* address, u32 block, u32 value) {
    asm volatile("st.shared::cluster.u32 [%0], %1;"
                 ::"r"(in_block(address, block)), "r"(value) : "memory");
}

__device__ void set_in_block(float* address, u32 block, float value) {
    asm volatile("st.shared::cluster.f32 [%0], %1;"
                 ::"r"(in_block(address, block)), "f"(value) : "memory");
}

__device__ u32 read_in_block(const u32* address, u32 block) {
    u32 value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(value) : "r"(in_block(address, block)) : "memory");
    return value;
}

__device__ float of_half(u16 value) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(value));
    return number;
}

__device__ u16 to_half(float value) {
    u16 number;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(number) : "f"(value));
    return number;
}

__device__ u16 to_bfloat(float value) {
    u16 number;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(number) : "f"(value));
    return number;
}

// Reads of what is not `valid` are 0. No branch: many reads have to be on their way at a time.
// Weights are read once: they need not stay in the first cache.
__device__ void read_once(const unsigned char* at, bool valid, u32 (&words)[4]) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0;"
        " mov.u32 %3, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "l"(at), "r"((u32)valid));
}

__device__ void read_once(const unsigned char* at, bool valid, u32 (&words)[2]) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
        " @p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2]; }"
        : "=&r"(words[0]), "=&r"(words[1]) : "l"(at), "r"((u32)valid));
}

__device__ void read_once(const unsigned char* at, bool valid, u32 (&words)[1]) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0;"
        " @p ld.global.nc.L1::no_allocate.u32 %0, [%1]; }"
        : "=&r"(words[0]) : "l"(at), "r"((u32)valid));
}

// What other blocks read too: it may stay in the first cache.
__device__ void read_often(const void* at, bool valid, u32 (&words)[4]) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0;"
        " mov.u32 %3, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "l"(at), "r"((u32)valid));
}

__device__ void read_often(const void* at, bool valid, u32 (&words)[2]) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
        " @p ld.global.v2.u32 {%0, %1}, [%2]; }"
        : "=&r"(words[0]), "=&r"(words[1]) : "l"(at), "r"((u32)valid));
}

__device__ u32 read_word(const void* at, bool valid) {
    u32 read;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.u32 %0, [%1]; }"
                 : "=&r"(read) : "l"(at), "r"((u32)valid));
    return read;
}

__device__ u16 read_short(const void* at, bool valid) {
    u16 read;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u16 %0, 0; @p ld.global.u16 %0, [%1]; }"
                 : "=&h"(read) : "l"(at), "r"((u32)valid));
    return read;
}

__device__ u32 read_byte(const void* at, bool valid) {
    u32 read;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.u8 %0, [%1]; }"
                 : "=&r"(read) : "l"(at), "r"((u32)valid));
    return read;
}
