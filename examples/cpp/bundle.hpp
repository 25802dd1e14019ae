// A bundle in memory: its manifest, its partitions in the order in which they run, and what passes between placements.
#pragma once
#include <fstream>
#include <iostream>
#include <iterator>
#include <set>
#include <sstream>

#include "codecs.hpp"

struct Partition {
  std::string name, placement;
  std::vector<std::string> inputs, outputs;
  torch::jit::Module module;
};

class Bundle {
 public:
  Json manifest;
  std::vector<Partition> partitions;
  std::vector<Crossing> crossings;
  std::map<std::string, torch::Tensor> settings;  // T.levels, which each side knows by itself

  // `bits` other than 0 is another width of all integer codes, which both sides must agree on.
  explicit Bundle(std::string folder, int bits = 0) : folder_(std::move(folder)) {
    manifest = JsonReader(content("manifest.json")).read();
    if (manifest["schema"].whole() != 5) throw std::runtime_error("this example reads schema 5");
    if (!manifest["draws"].items.empty()) throw std::runtime_error("this example draws no noise");
    Json rest = manifest;
    rest.members.erase(std::find_if(rest.members.begin(), rest.members.end(), [](auto& m) { return m.first == "digest"; }));
    if (hexadecimal(sha256(canonical(rest))) != manifest["digest"].text) throw std::runtime_error("the manifest has changed");
    read_partitions();
    for (auto& part : partitions)
      for (auto& edge : manifest["route"].items)
        if (edge["producer"].text == part.name) read_edge(part, edge, bits);
    if (!manifest["policy"].null()) read_states(manifest["policy"]["kind"].text);
  }

  std::string place(const std::string& partition) const {
    for (auto& part : partitions)
      if (part.name == partition) return part.placement;
    throw std::runtime_error("no partition is called " + partition);
  }

  // The sample batch of a placement, which a safetensors file holds.
  std::map<std::string, torch::Tensor> sample(const std::string& placement) const {
    std::string file = verified(manifest["samples"][placement]);
    uint64_t length = 0;
    std::memcpy(&length, file.data(), 8);
    Json header = JsonReader(file.substr(8, length)).read();
    static const std::map<std::string, torch::ScalarType> types = {
        {"U8", torch::kByte}, {"I32", torch::kInt}, {"I64", torch::kLong}, {"F32", torch::kFloat}};
    std::map<std::string, torch::Tensor> found;
    for (auto& [name, entry] : header.members) {
      if (name == "__metadata__") continue;
      std::vector<int64_t> sizes;
      for (auto& size : entry["shape"].items) sizes.push_back(size.whole());
      char* data = &file[8 + length + entry["data_offsets"].items[0].whole()];
      found[name] = torch::from_blob(data, sizes, types.at(entry["dtype"].text)).clone();
    }
    return found;
  }

 private:
  std::string folder_;

  std::string content(const std::string& name) const {
    std::ifstream file(folder_ + "/" + name, std::ios::binary);
    if (!file) throw std::runtime_error(name + " is missing");
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::string verified(const Json& entry) const {
    std::string found = content(entry["file"].text);
    if (found.size() != static_cast<size_t>(entry["bytes"].whole()) || hexadecimal(sha256(found)) != entry["sha256"].text)
      throw std::runtime_error(entry["file"].text + " has changed");
    return found;
  }

  // A partition runs behind all that it takes something of; of those that could be next, the one listed first is.
  void read_partitions() {
    std::vector<const Json*> left;
    for (auto& item : manifest["partitions"].items) left.push_back(&item);
    while (!left.empty()) {
      auto waits = [&](const Json* item) {
        for (auto& edge : manifest["route"].items)
          for (auto other : left)
            if (edge["consumer"].text == (*item)["name"].text && edge["producer"].text == (*other)["name"].text) return true;
        return false;
      };
      auto next = std::find_if_not(left.begin(), left.end(), waits);
      if (next == left.end()) throw std::runtime_error("the route has a cycle");
      const Json& item = **next;
      Partition part{item["name"].text, item["placement"].text, {}, {}, {}};
      for (auto& input : item["inputs"].items) part.inputs.push_back(input["name"].text);
      for (auto& output : item["outputs"].items) part.outputs.push_back(output["name"].text);
      std::istringstream file(verified(item));
      part.module = torch::jit::load(file);
      part.module.eval();
      partitions.push_back(std::move(part));
      left.erase(next);
    }
  }

  void read_edge(const Partition& producer, const Json& edge, int bits) {
    std::string target = place(edge["consumer"].text);
    if (target == producer.placement) return;  // handed over as it is
    for (auto& transfer : edge["transfers"].items) {
      Codec codec{transfer["codec"]};
      std::string tensor = transfer["tensor"].text;
      codec.parts();  // refuses a kind that this example does not know
      if (bits && codec.kind == "uniform") codec.spec.set("bits", Json::of(bits));
      if (codec.kind == "uniform") settings[tensor + ".levels"] = torch::tensor(int64_t(1) << codec.bits());
      bool known = false;
      for (auto& other : crossings) known = known || (other.tensor == tensor && other.target == target);
      if (!known) add({tensor, producer.name, producer.placement, target, codec});
    }
  }

  // What a policy must know of an exit goes with the edges to the next exit, where that stands in another placement.
  void read_states(const std::string& kind) {
    auto& exits = manifest["exits"].items;
    double classes = static_cast<double>(manifest["outputs"].items[0]["class_names"].items.size());
    std::vector<std::string> names;
    if (kind == "patience") names = {"answered", "agreed"};
    if (kind == "ensemble") names = {"log_p"};
    // The last exit may answer without it.
    bool unneeded = kind == "patience" || (kind == "ensemble" && !manifest["policy"]["last"].truth);
    for (size_t i = 0; i + (unneeded ? 2 : 1) < exits.size(); ++i) {
      std::string from = exits[i]["partition"].text, to = exits[i + 1]["partition"].text;
      if (names.empty() || place(from) == place(to)) continue;
      Codec codec{JsonReader(R"({"kind": "float32", "shape": [1]})").read()};
      if (kind == "ensemble") codec.spec.set("shape", Json::of(std::vector<int64_t>{int64_t(i) + 1, int64_t(classes)}));
      for (auto edge : path(from, to))
        for (auto& name : names) {
          std::string producer = (*edge)["producer"].text, target = place((*edge)["consumer"].text);
          add({exits[i]["name"].text + "/" + name, producer, place(producer), target, codec, name});
        }
    }
  }

  // The edges between placements on the way from one partition to another that has the fewest of them.
  std::vector<const Json*> path(const std::string& from, const std::string& to) const {
    std::map<std::string, std::vector<const Json*>> best = {{from, {}}};
    for (auto& part : partitions)
      for (auto& edge : manifest["route"].items) {
        const std::string& before = edge["producer"].text;
        if (edge["consumer"].text != part.name || !best.count(before)) continue;
        auto way = best[before];
        if (place(before) != part.placement) way.push_back(&edge);
        if (!best.count(part.name) || way.size() < best[part.name].size()) best[part.name] = way;
      }
    return best.at(to);
  }

  void add(Crossing crossing) {
    if (manifest["envelope"].truth) crossing.enclose(manifest["digest"].text);
    crossings.push_back(std::move(crossing));
  }
};
