// Tensors of one sample to bytes and back, by the codecs `float32`, `uniform` and `entropy`, and the envelope around them.
#pragma once
#include <torch/script.h>

#include <cstring>
#include <map>
#include <numeric>

#include "digests.hpp"
#include "json.hpp"
#include "range_coder.hpp"

using Tensors = std::map<std::string, torch::Tensor>;  // by a codec's own names: z, or codes, low, high

template <typename T>
std::string raw(const torch::Tensor& tensor, torch::ScalarType type) {
  auto values = tensor.to(type).contiguous();
  return std::string(reinterpret_cast<const char*>(values.data_ptr<T>()), values.numel() * sizeof(T));
}

struct Codec {
  Json spec;
  std::string kind = spec["kind"].text;

  std::vector<int64_t> shape() const {
    std::vector<int64_t> sizes;
    for (auto& size : spec["shape"].items) sizes.push_back(size.whole());
    return sizes;
  }
  int bits() const { return kind == "float32" ? 32 : kind == "uniform" ? static_cast<int>(spec["bits"].whole()) : 0; }
  std::vector<std::string> parts() const {  // what a sender emits and a receiver is given
    if (kind == "float32") return {""};
    if (kind == "entropy") return {".codes"};
    if (kind == "uniform") return {".codes", ".low", ".high"};
    throw std::runtime_error("this example knows the codecs float32, uniform and entropy, not " + kind);
  }

  // All tensors are batches of one sample, little-endian in memory as on the wire.
  std::string encode(const Tensors& sent) const {
    if (kind == "float32") return raw<float>(sent.at(""), torch::kFloat);
    if (kind == "entropy") return encode_entropy(sent.at(".codes"));
    std::string found;
    if (spec["low"].null())
      found = raw<float>(sent.at(".low"), torch::kFloat) + raw<float>(sent.at(".high"), torch::kFloat);
    auto codes = sent.at(".codes").to(torch::kInt).contiguous();
    uint64_t buffer = 0;
    int filled = 0;
    for (int64_t i = 0; i < codes.numel(); ++i) {
      buffer = buffer << bits() | static_cast<uint32_t>(codes.data_ptr<int>()[i]);
      for (filled += bits(); filled >= 8; filled -= 8) found += static_cast<char>(buffer >> (filled - 8));
    }
    if (filled) found += static_cast<char>(buffer << (8 - filled));
    return found;
  }

  Tensors decode(const std::string& payload) const {
    auto sizes = shape();
    sizes.insert(sizes.begin(), 1);
    int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>());
    if (kind == "entropy") return {{".codes", decode_entropy(payload, sizes)}};
    bool own = kind == "uniform" && spec["low"].null();
    if (payload.size() != static_cast<size_t>((count * bits() + 7) / 8 + 8 * own)) throw std::runtime_error("a payload of another length");
    auto floats = [&](size_t at, int64_t n) {
      auto found = torch::empty({n}, torch::kFloat);
      std::memcpy(found.data_ptr<float>(), payload.data() + at, 4 * n);
      return found;
    };
    if (kind == "float32") return {{"", floats(0, count).view(sizes)}};
    auto fixed = [&](const char* name) { return torch::tensor({static_cast<float>(spec[name].number)}); };
    Tensors found = {{".low", own ? floats(0, 1) : fixed("low")}, {".high", own ? floats(4, 1) : fixed("high")}};
    auto codes = torch::empty(sizes, torch::kInt);
    uint64_t buffer = 0;
    int filled = 0;
    size_t next = 8 * own;
    for (int64_t i = 0; i < count; ++i) {
      for (; filled < bits(); filled += 8) buffer = buffer << 8 | static_cast<unsigned char>(payload[next++]);
      filled -= bits();
      codes.data_ptr<int>()[i] = static_cast<int>(buffer >> filled & ((1u << bits()) - 1));
    }
    found[".codes"] = codes;
    return found;
  }

 private:
  int64_t channel_dimension() const { return spec["axis"].whole() == 0 ? 1 : static_cast<int64_t>(shape().size()); }
  std::vector<uint64_t> before(size_t channel) const {
    std::vector<uint64_t> found = {0};
    for (auto& frequency : spec["frequencies"].items[channel].items) found.push_back(found.back() + frequency.whole());
    return found;
  }

  std::string encode_entropy(const torch::Tensor& codes) const {
    auto rows = codes.to(torch::kInt).movedim(channel_dimension(), 1).contiguous();
    int64_t channels = rows.size(1), positions = rows.numel() / channels;
    RangeEncoder encoder;
    for (int64_t c = 0; c < channels; ++c) {
      auto table = before(c);
      for (int64_t i = 0; i < positions; ++i) {
        int64_t symbol = rows.data_ptr<int>()[c * positions + i] - spec["lows"].items[c].whole();
        if (symbol < 0 || symbol + 1 >= static_cast<int64_t>(table.size())) throw std::runtime_error("a code that the prior does not know");
        if (table.size() > 2) encoder.put(table[symbol], table[symbol + 1] - table[symbol]);
      }
    }
    std::string bitstream = encoder.finish();
    return bitstream + big_endian(crc32(bitstream + raw<int>(rows, torch::kInt)));
  }

  torch::Tensor decode_entropy(const std::string& payload, std::vector<int64_t> sizes) const {
    if (payload.size() < 4) throw std::runtime_error("a payload without its check");
    std::string bitstream = payload.substr(0, payload.size() - 4);
    auto rows = torch::empty(sizes, torch::kInt).movedim(channel_dimension(), 1).contiguous();
    int64_t channels = rows.size(1), positions = rows.numel() / channels;
    RangeDecoder decoder(bitstream);
    for (int64_t c = 0; c < channels; ++c) {
      auto table = before(c);
      for (int64_t i = 0; i < positions; ++i) {
        int64_t symbol = table.size() > 2 ? decoder.take(table) : 0;
        rows.data_ptr<int>()[c * positions + i] = static_cast<int>(symbol + spec["lows"].items[c].whole());
      }
    }
    if (big_endian(crc32(bitstream + raw<int>(rows, torch::kInt))) != payload.substr(payload.size() - 4))
      throw std::runtime_error("a damaged payload, or one of other tables");
    return rows.movedim(1, channel_dimension()).contiguous();
  }
};

// One tensor that is sent from a placement to another.
struct Crossing {
  std::string tensor, producer, source, target;
  Codec codec;
  std::string state = "";  // what an exit policy calls it, if it is part of a policy's state
  std::string head = "";   // the first 8 bytes of its envelope; empty where the bundle has none

  void enclose(const std::string& bundle_digest) {
    Json edge;
    edge.set("codec", codec.spec), edge.set("target", Json::of(target)), edge.set("tensor", Json::of(tensor));
    head = std::string("\x01") + static_cast<char>(codec.bits());
    for (size_t i = 0; i < 6; i += 2) head += static_cast<char>(std::stoi(bundle_digest.substr(i, 2), nullptr, 16));
    head += sha256(canonical(edge)).substr(0, 3);
  }
  std::string seal(const std::string& payload) const {
    return head.empty() ? payload : head + big_endian(crc32(head + payload)) + payload;
  }
  std::string opened(const std::string& sealed) const {
    if (head.empty()) return sealed;
    std::string payload = sealed.size() < 12 ? "" : sealed.substr(12);
    if (sealed.size() < 12 || sealed.substr(8, 4) != big_endian(crc32(sealed.substr(0, 8) + payload)))
      throw std::runtime_error("a damaged payload of " + tensor);
    if (sealed.substr(0, 8) != head) throw std::runtime_error("a payload of another bundle, width or edge than " + tensor);
    return payload;
  }
};
