// Products of masked activations with records that are in memory or on their way from the disk.
// Knows masks, not how they are decided; knows no Python.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gather.h"
#include "memory.h"
#include "pool.h"
#include "reader.h"
#include "rows.h"
#include "site.h"
#include "staging.h"

namespace dipnet {

// A record could not be read, or is not what was packed. The engine stays usable: nothing of the
// request remains, and what the cache counts as resident is read again when it is wanted.
struct RecordError : std::runtime_error {
  RecordError(std::size_t site, std::size_t unit, int error);
  std::size_t site, unit;
  int error;  // errno, 0: the checksum does not fit
};

// One request at a time:
//     access (once for each token, with its mask), begin, any number of partial and prefetch, finish
//
// begin asks for the records that are missing and multiplies with those in memory meanwhile; finish
// multiplies with the others as they arrive. A record goes to the slot that the cache gave its unit,
// or, streamed past the cache, to a frame that is free again once it was used.
//
// Records of whole neurons are asked for by rows, which multiplies their rows, and then, once the
// caller has activated what these made, columns.
class Engine {
 public:
  // Records that are multiplied together while others are on their way.
  static constexpr std::size_t kBatch = 64;
  // Records in memory that are multiplied before the disk's queue is looked after again: a few
  // milliseconds, in which 128 reads of 20 KiB are not done.
  static constexpr std::size_t kHeld = 256;

  // `frame_bytes` of memory for records on their way: the staging, and frames of the largest record.
  Engine(std::unique_ptr<Reader> reader, std::size_t threads, std::size_t frame_bytes,
         std::size_t largest_record);
  ~Engine();

  std::size_t add(const Layout& layout, std::vector<float> scale, std::size_t slots, Policy policy);

  const Site& site(std::size_t number) const { return sites_.at(number); }
  const Reader& reader() const { return *reader_; }

  // The cache's view of one token's mask (units). Gives up a request of the site that was begun.
  Access access(std::size_t site, const bool* wanted);

  // Reads everything that the cache counts as resident and that is not in memory yet.
  void load(std::size_t site);

  // x (tokens, channels), masks (tokens, units).
  void begin(std::size_t site, const float* x, const bool* masks, std::size_t tokens);

  // y (tokens, rows): what the records multiplied so far make; not for bf16, which multiplies none
  // before finish.
  void partial(float* y);

  // Reads wanted (units) records of a site ahead into frames, those of the highest score first, as
  // many as the disk delivers in the time in which it would have nothing to do; or as fit, when
  // they are certain to be needed. Gives up a request of the same site, as access does.
  void prefetch(std::size_t site, const bool* wanted, const float* score, bool certain);

  // y (tokens, rows), when all records have been multiplied.
  void finish(float* y);

  // Of a site of neurons, x (tokens, rows) and masks (tokens, units): y (tokens, input_rows, units)
  // is what the rows of the wanted neurons make, 0 elsewhere. A record is read once for all tokens.
  void rows(std::size_t site, const float* x, const bool* masks, std::size_t tokens, float* y);

  // h (tokens, units), the neurons of the last rows: y (tokens, rows), with their columns.
  void columns(const float* h, float* y);

  const Site& asked() const { return sites_.at(active_); }  // of the last request

  // (tokens, rows) of the request; throws std::logic_error when there is none.
  std::pair<std::size_t, std::size_t> result_shape() const;

  void reset_totals();

  // The frames' memory, half of which guesses may take.
  std::size_t frame_bytes() const { return frame_count_ * frame_bytes_; }

 private:
  using Clock = std::chrono::steady_clock;

  // bf16 is added up in this many units at a time, in order: float sums depend on it.
  static constexpr std::size_t kOrdered = 64;

  struct Piece {
    // One of slot and frame is kNone, or both until the piece is read: it takes a frame then.
    std::int32_t unit, slot, frame;
  };
  struct Flight {  // one read under way, into its pieces' places or into a room of the staging
    std::size_t site = 0;
    std::vector<Piece> pieces;
    std::uint8_t* room = nullptr;
  };

  Site& active() { return sites_[active_]; }
  std::uint8_t* frame(std::int32_t f) const { return frames_.data() + f * frame_bytes_; }
  const std::uint8_t* record(const Site& site, std::size_t unit) const;

  std::vector<std::int32_t> ask(std::size_t site, const bool* masks, std::size_t tokens);

  // Reads (engine_reads.cpp).
  void plan_reads();
  void feed();
  std::size_t read(std::size_t site, std::span<const Piece> pieces);
  std::size_t run_length(std::size_t site, std::span<const Piece> pieces) const;
  bool add_flight(std::size_t site, std::span<const Piece> run, std::vector<Read>& reads);
  Flight end_flight(std::uint64_t tag);
  std::int32_t take_frame(Site& site, std::int32_t unit);
  std::uint8_t* place(const Site& site, const Piece& piece) const;
  void reap(bool block);
  std::int32_t land(const Done& done);

  // Guesses (engine_ahead.cpp).
  void drop_stale_guesses();
  std::size_t idle_records(std::size_t site) const;

  void arrive();
  void collect();
  void verify();
  void settle();
  void in_order();
  void abandon();
  [[noreturn]] void fail(std::int32_t unit, int error);

  // Arithmetic (engine_multiply.cpp).
  void set_activations(const float* x);
  void multiply(const std::int32_t* units, std::size_t count);
  void multiply_held(const std::vector<std::int32_t>& units);
  void multiply_part(const std::int32_t* units, std::size_t count);
  void share_outputs();
  void share_columns();
  std::size_t parts() const;
  void sort_terms(std::size_t token, const std::int32_t* units, std::size_t count,
                  std::vector<Term>& terms) const;
  void write(float* y);
  const std::uint8_t* mask_of(std::size_t token) const;

  // Neurons (engine_neurons.cpp).
  void multiply_rows(const std::int32_t* units, std::size_t count);
  void multiply_columns();
  void keep_column(std::int32_t unit);
  const std::uint8_t* column(const Site& site, std::size_t unit) const;

  static double seconds_since(Clock::time_point begun) {
    return std::chrono::duration<double>(Clock::now() - begun).count();
  }

  std::unique_ptr<Reader> reader_;
  Pool pool_;
  Staging staging_;
  Memory frames_;
  std::size_t frame_bytes_;
  std::vector<std::int32_t> free_frames_;
  std::size_t frame_count_;
  std::vector<Site> sites_;
  std::vector<Flight> flights_;
  std::vector<std::size_t> free_flights_;
  std::vector<Done> done_;
  std::uint64_t brought_ = 0;  // bytes of records that were asked for: without the gaps between them

  // The request.
  bool running_ = false;
  std::size_t active_ = 0, tokens_ = 0;
  std::vector<Activations> activations_;  // (tokens)
  std::vector<std::uint8_t> masks_;       // (tokens, units)
  std::vector<std::uint8_t> wanted_;      // (units) by any token, and not multiplied yet
  std::vector<Totals> totals_;            // (tokens), or (parts) of a single token
  std::vector<Piece> queue_;              // to be read, in the order of the file
  std::size_t queued_ = 0;                // of them already under way
  std::size_t missing_ = 0;               // records that have not been multiplied yet
  std::vector<std::int32_t> ready_;       // arrived, not multiplied
  std::vector<std::vector<Term>> terms_;  // (tokens)

  // Of a request of neurons.
  std::size_t first_token_ = 0;             // of the tokens whose columns are multiplied
  std::vector<RowInput> inputs_;            // (tokens)
  float* made_ = nullptr;                   // (tokens, input_rows, units) what the rows make
  std::vector<std::int32_t> neurons_;       // that any token wants, in order
  Memory columns_;                          // of records that have lost their frame or slot
  std::vector<std::int32_t> column_of_;     // (units) its place there
  std::size_t columns_kept_ = 0;

  // How long the disk has nothing to do before a site's request, in the mean.
  std::vector<double> idle_;                    // (sites) seconds
  std::vector<Clock::time_point> guessed_at_;   // (sites)
  Clock::time_point last_arrival_;
};

}  // namespace dipnet
