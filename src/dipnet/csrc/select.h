// Exact top-k selection over rows of scores. Knows no Python and no torch.
#pragma once

#include <cstddef>

namespace dipnet {

// Writes mask (rows, n): exactly k true in each row, at the k highest of scores (rows, n).
// NaN ranks above +inf, -0 equals +0, ties go to the lowest index. Needs 0 < k <= n.
// Uses at most `threads` threads, and fewer when there is too little work to share.
void topk_mask(const float* scores, bool* mask, std::size_t rows, std::size_t n, std::size_t k,
               std::size_t threads);

// The same with scores times gamma wherever resident (n) is false: one residency for all rows.
void cache_aware_topk(const float* scores, const bool* resident, float gamma, bool* mask,
                      std::size_t rows, std::size_t n, std::size_t k, std::size_t threads);

}  // namespace dipnet
