// Loops that gain from wider vectors are compiled twice and the loader picks by the CPU. Elsewhere
// they are compiled once, for the baseline.
#pragma once

// The loader picks before the thread sanitizer is set up: with it they are not compiled twice.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)
#define DIPNET_SIMD __attribute__((target_clones("default", "avx2")))
#else
#define DIPNET_SIMD
#endif
