// JSON: reading it, and its one spelling by RFC 8785, over which a manifest's digest is taken.
#pragma once
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct Json {
  enum Kind { Null, Bool, Number, Text, List, Object } kind = Null;
  bool truth = false;
  double number = 0;
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  bool null() const { return kind == Null; }
  bool has(const std::string& key) const { return find(key) != nullptr; }
  int64_t whole() const { return static_cast<int64_t>(number); }
  const Json* find(const std::string& key) const {
    for (auto& [name, value] : members)
      if (name == key) return &value;
    return nullptr;
  }
  const Json& operator[](const std::string& key) const {
    if (auto found = find(key)) return *found;
    throw std::runtime_error("the key " + key + " is missing");
  }
  void set(const std::string& key, Json value) {
    for (auto& [name, old] : members)
      if (name == key) return void(old = std::move(value));
    members.emplace_back(key, std::move(value));
    kind = Object;
  }
  static Json of(double value) { Json j; j.kind = Number; j.number = value; return j; }
  static Json of(const std::string& value) { Json j; j.kind = Text; j.text = value; return j; }
  static Json of(const std::vector<int64_t>& values) {
    Json j;
    j.kind = List;
    for (auto value : values) j.items.push_back(of(static_cast<double>(value)));
    return j;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& content) : at_(content.data()), end_(at_ + content.size()) {}
  Json read() {
    Json value = next(0);
    if (blank(), at_ != end_) fail("something follows the value");
    return value;
  }

 private:
  const char *at_, *end_;

  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error("not JSON: " + what); }
  void blank() { while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_; }
  bool take(const std::string& word) {
    blank();
    if (static_cast<size_t>(end_ - at_) < word.size() || !std::equal(word.begin(), word.end(), at_)) return false;
    at_ += word.size();
    return true;
  }
  void need(const std::string& word) { if (!take(word)) fail("expected " + word); }

  Json next(int depth) {
    if (depth > 100) fail("nested too deeply");
    Json value;
    if (take("{")) {
      value.kind = Json::Object;
      if (take("}")) return value;
      do {
        need("\"");
        std::string key = string();
        if (value.has(key)) fail("the key " + key + " appears twice");
        need(":");
        value.members.emplace_back(key, next(depth + 1));
      } while (take(","));
      need("}");
    } else if (take("[")) {
      value.kind = Json::List;
      if (take("]")) return value;
      do value.items.push_back(next(depth + 1)); while (take(","));
      need("]");
    } else if (take("\"")) {
      value = Json::of(string());
    } else if (take("true")) {
      value.kind = Json::Bool, value.truth = true;
    } else if (take("false")) {
      value.kind = Json::Bool;
    } else if (!take("null")) {
      value.kind = Json::Number;
      auto [stop, error] = std::from_chars(at_, end_, value.number);
      if (error != std::errc() || !std::isfinite(value.number)) fail("expected a value");
      at_ = stop;
    }
    return value;
  }

  unsigned hex() {
    unsigned value = 0;
    if (end_ - at_ < 4 || std::from_chars(at_, at_ + 4, value, 16).ptr != at_ + 4) fail("a broken escape");
    at_ += 4;
    return value;
  }
  std::string string() {
    std::string found;
    for (; at_ != end_ && *at_ != '"'; ) {
      char c = *at_++;
      if (c != '\\') { found += c; continue; }
      if (at_ == end_) break;
      static const std::string from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
      c = *at_++;
      if (auto place = from.find(c); place != std::string::npos) { found += to[place]; continue; }
      if (c != 'u') fail("an unknown escape");
      unsigned code = hex();
      if (code >= 0xd800 && code < 0xdc00) {
        need("\\u");
        code = 0x10000 + ((code - 0xd800) << 10) + (hex() - 0xdc00);
      }
      if (code < 0x80) found += static_cast<char>(code);
      else {
        int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
        found += static_cast<char>((0xff00 >> (more + 1) & 0xff) | code >> 6 * more);
        while (more--) found += static_cast<char>(0x80 | (code >> 6 * more & 0x3f));
      }
    }
    if (at_++ == end_) fail("a text without an end");
    return found;
  }
};

// The units of UTF-16, by which RFC 8785 sorts keys.
inline std::vector<unsigned> utf16(const std::string& text) {
  std::vector<unsigned> units;
  for (size_t i = 0; i < text.size();) {
    unsigned char first = text[i];
    int more = first < 0x80 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
    unsigned code = more ? first & (0x3f >> more) : first;
    for (int k = 1; k <= more && i + k < text.size(); ++k) code = code << 6 | (text[i + k] & 0x3f);
    i += more + 1;
    if (code < 0x10000) units.push_back(code);
    else units.insert(units.end(), {0xd800 + ((code - 0x10000) >> 10), 0xdc00 + ((code - 0x10000) & 0x3ff)});
  }
  return units;
}

// A number as ECMAScript spells it: the shortest digits that read back, with an exponent from 1e21 and below 1e-6.
inline std::string spelled(double value) {
  if (value == 0) return "0";
  char buffer[64];
  auto stop = std::to_chars(buffer, buffer + sizeof buffer, std::fabs(value), std::chars_format::scientific).ptr;
  std::string shortest(buffer, stop), digits = shortest.substr(0, shortest.find('e'));
  int point = std::stoi(shortest.substr(shortest.find('e') + 1)) + 1;  // where the point stands among the digits
  digits.erase(std::remove(digits.begin(), digits.end(), '.'), digits.end());
  int count = static_cast<int>(digits.size());
  std::string found;
  if (count <= point && point <= 21) found = digits + std::string(point - count, '0');
  else if (0 < point && point <= 21) found = digits.substr(0, point) + "." + digits.substr(point);
  else if (-6 < point && point <= 0) found = "0." + std::string(-point, '0') + digits;
  else {
    found = digits.substr(0, 1) + (count > 1 ? "." + digits.substr(1) : "") + "e";
    found += (point > 0 ? "+" : "-") + std::to_string(std::abs(point - 1));
  }
  return (value < 0 ? "-" : "") + found;
}

inline std::string spelled_text(const std::string& text) {
  static const std::string named = "\"\\\b\f\n\r\t", letters = "\"\\bfnrt";
  std::string found = "\"";
  for (unsigned char c : text) {
    if (auto place = named.find(static_cast<char>(c)); place != std::string::npos) found += std::string("\\") + letters[place];
    else if (c < 0x20) found += std::string("\\u00") + "01"[c >> 4] + "0123456789abcdef"[c & 15];
    else found += static_cast<char>(c);
  }
  return found + "\"";
}

inline std::string canonical(const Json& value) {
  std::string found;
  switch (value.kind) {
    case Json::Null: return "null";
    case Json::Bool: return value.truth ? "true" : "false";
    case Json::Number: return spelled(value.number);
    case Json::Text: return spelled_text(value.text);
    case Json::List:
      for (auto& item : value.items) found += (found.empty() ? "" : ",") + canonical(item);
      return "[" + found + "]";
    case Json::Object: break;
  }
  auto sorted = value.members;
  std::sort(sorted.begin(), sorted.end(), [](auto& a, auto& b) { return utf16(a.first) < utf16(b.first); });
  for (auto& [key, item] : sorted) found += (found.empty() ? "" : ",") + spelled_text(key) + ":" + canonical(item);
  return "{" + found + "}";
}
