// The entropy coder of docs/bundle.md: a range coder of 64 bits of state and words of 32 bits, in whole numbers alone.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

// Frequencies sum to 2^16; the coder counts in 2^24ths, of which each is worth 2^8.
constexpr uint64_t UNIT = 1 << 8, TOTAL = 1 << 24;

class RangeEncoder {
 public:
  void put(uint64_t before, uint64_t frequency) {
    uint64_t step = (width_ >> 24) * UNIT, added = step * before;
    low_ += added;
    if (low_ < added)  // a carry goes into what was written
      for (size_t i = words_.size(); i-- > 0 && ++words_[i] == 0;) {}
    width_ = step * frequency;
    if (width_ >> 32) return;
    words_.push_back(static_cast<uint32_t>(low_ >> 32));
    low_ <<= 32, width_ <<= 32;
  }

  // The number of the last interval with the most trailing zero bits, without its trailing zero bytes.
  std::string finish() const {
    std::string low;
    for (uint32_t word : words_)
      for (int shift = 24; shift >= 0; shift -= 8) low += static_cast<char>(word >> shift);
    for (int shift = 56; shift >= 0; shift -= 8) low += static_cast<char>(low_ >> shift);
    if (low.find_first_not_of('\0') == std::string::npos) return "";
    std::string before = low, high = low;
    for (size_t i = before.size(); i-- > 0 && before[i]-- == 0;) {}
    uint64_t rest = width_ - 1, carry = 0;
    for (size_t i = high.size(); i-- > 0; rest >>= 8) {
      carry += static_cast<unsigned char>(high[i]) + (rest & 255);
      high[i] = static_cast<char>(carry), carry >>= 8;
    }
    size_t place = 0;
    while (before[place] == high[place]) ++place;
    unsigned differing = static_cast<unsigned char>(before[place] ^ high[place]), top = 1;
    while (differing >> top) ++top;
    high.resize(place + 1);  // it ends with the first bit that differs, which is 1
    high[place] = static_cast<char>(static_cast<unsigned char>(high[place]) >> (top - 1) << (top - 1));
    return high;
  }

 private:
  std::vector<uint32_t> words_;
  uint64_t low_ = 0, width_ = ~0ull;
};

class RangeDecoder {
 public:
  explicit RangeDecoder(std::string bitstream) : bytes_(std::move(bitstream)) {
    point_ = uint64_t(word()) << 32;
    point_ |= word();
  }

  // The next symbol, given how many are before each symbol, and all at the end.
  size_t take(const std::vector<uint64_t>& before) {
    uint64_t step = width_ >> 24, place = (point_ - low_) / step;
    if (place >= TOTAL) throw std::runtime_error("a bitstream that no codes encode to");
    size_t symbol = 0;
    while (before[symbol + 1] * UNIT <= place) ++symbol;
    low_ += step * UNIT * before[symbol];
    width_ = step * UNIT * (before[symbol + 1] - before[symbol]);
    if (width_ >> 32 == 0) low_ <<= 32, width_ <<= 32, point_ = point_ << 32 | word();
    return symbol;
  }

 private:
  std::string bytes_;
  size_t next_ = 0;
  uint64_t point_ = 0, low_ = 0, width_ = ~0ull;

  uint32_t word() {
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i, ++next_)
      found = found << 8 | (next_ < bytes_.size() ? static_cast<unsigned char>(bytes_[next_]) : 0u);
    return found;
  }
};
