#include "site.h"

#include <stdexcept>

#include "checksum.h"
#include "reader.h"

namespace dipnet {

void Layout::check(std::uint64_t file_bytes) const {
  const auto need = [](bool fact, const char* what) {
    if (!fact) throw std::invalid_argument(std::string("this layout of records is wrong: ") + what);
  };
  constexpr std::size_t kMost = std::size_t{1} << 31;
  need(channels > 0 && channels < kMost && block > 0 && channels % block == 0, "channels, block");
  need(kind == Kind::bf16 || channels <= kMostTerms, "more channels than sums of integers hold");
  need(outputs > 0 && outputs < kMost && outputs % kTile == 0, "outputs");
  need(rows > 0 && rows <= outputs, "rows");
  need(input_rows == 0 || (input_rows <= 2 && block == 1), "input_rows");
  need(stride == column_bytes(kind, outputs), "stride");
  need(record_bytes % kSector == 0 && record_bytes / runs() >= stride &&
           record_bytes - runs() * stride >= kChecksumBytes &&
           record_bytes - runs() * stride <= kSector + kChecksumBytes,
       "record_bytes");
  need(offset % kSector == 0 && offset <= file_bytes &&
           units() <= (file_bytes - offset) / record_bytes,
       "records beyond the end of the file");
}

Site::Site(const Layout& layout, std::vector<float> scale, std::size_t slots, Policy policy)
    : layout(layout),
      scale(std::move(scale)),
      cache(layout.units(), slots, policy),
      memory(slots * layout.record_bytes),
      slot_with(layout.units(), kNone),
      unit_at(slots, kNone),
      frame_of(layout.units(), kNone),
      arrived(layout.units(), 0) {
  const std::size_t scales = layout.channels * (layout.input_rows + 1);
  if (this->scale.size() != (layout.kind == Kind::bf16 ? 0 : scales)) {
    throw std::invalid_argument("a site needs one scale for each column, and none for bf16");
  }
}

void Site::put(std::int32_t unit, std::int32_t slot) {
  empty_slot(slot);
  if (slot_with[unit] == kNone) ++present;
  slot_with[unit] = slot;
  unit_at[slot] = unit;
}

void Site::empty_slot(std::int32_t slot) {
  if (unit_at[slot] == kNone) return;
  slot_with[unit_at[slot]] = kNone;
  unit_at[slot] = kNone;
  --present;
}

}  // namespace dipnet
