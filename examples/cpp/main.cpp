// Runs all sides of a bundle on its own sample batch, and prints every payload and every answer:
//
//   payload TENSOR TARGET ROW HEXADECIMAL
//   answer ROW EXIT VALUE ...
//
// Usage: reader BUNDLE [BITS]
#include <cstdio>
#include <deque>

#include "bundle.hpp"
#include "policy.hpp"

// What one placement knows of the request.
struct Side {
  bool begun = false;
  std::vector<int64_t> rows;
  std::map<std::string, torch::Tensor> tensors;  // one row for each of `rows`
  State state;
  std::set<std::string> ran, went;

  void keep(const std::vector<int64_t>& places) {
    if (places.size() == rows.size()) return;
    std::vector<int64_t> kept;
    for (auto place : places) kept.push_back(rows[place]);
    rows = kept;
    for (auto& [name, tensor] : tensors) tensor = tensor.index_select(0, torch::tensor(places, torch::kLong));
    for (auto& [name, tensor] : state) tensor = tensor.index_select(0, torch::tensor(places, torch::kLong));
  }
};

struct Message {
  std::string target;
  std::vector<int64_t> rows;
  std::map<std::string, torch::Tensor> tensors;
  State state;
};

static void arrive(Side& side, Message message) {
  if (!side.begun) side.rows = message.rows, side.begun = true;
  std::vector<int64_t> stay, places;
  for (size_t i = 0; i < side.rows.size(); ++i)
    if (std::count(message.rows.begin(), message.rows.end(), side.rows[i])) stay.push_back(i);
  side.keep(stay);
  for (size_t i = 0; i < message.rows.size(); ++i)
    if (std::count(side.rows.begin(), side.rows.end(), message.rows[i])) places.push_back(i);
  for (auto& [name, tensor] : message.tensors)
    side.tensors[name] = tensor.index_select(0, torch::tensor(places, torch::kLong));
  for (auto& [name, tensor] : message.state)
    side.state[name] = tensor.index_select(0, torch::tensor(places, torch::kLong));
}

static void answer(const Side& side, const std::vector<int64_t>& places, int exit, const torch::Tensor& logits) {
  for (auto place : places) {
    std::printf("answer %ld %d", static_cast<long>(side.rows[place]), exit);
    auto row = logits[place].contiguous();
    for (int64_t i = 0; i < row.numel(); ++i) std::printf(" %.9g", row.data_ptr<float>()[i]);
    std::printf("\n");
  }
}

static void run(Partition& part, Side& side, const Bundle& bundle) {
  std::vector<torch::jit::IValue> arguments;
  for (auto& name : part.inputs)
    arguments.emplace_back(bundle.settings.count(name) ? bundle.settings.at(name) : side.tensors.at(name));
  auto result = part.module.forward(arguments);
  side.ran.insert(part.name);
  for (size_t i = 0; i < part.outputs.size(); ++i)
    side.tensors[part.outputs[i]] = result.isTuple() ? result.toTuple()->elements()[i].toTensor() : result.toTensor();
  auto& exits = bundle.manifest["exits"].items;
  for (size_t exit = 0; exit < std::max<size_t>(exits.size(), 1); ++exit) {
    bool final = exit + 1 >= exits.size();
    std::string name = final ? "logits" : exits[exit]["name"].text + "/logits";
    if (!std::count(part.outputs.begin(), part.outputs.end(), name)) continue;
    auto logits = side.tensors[name];
    auto leave = torch::full({logits.size(0)}, final, torch::kBool);
    if (!bundle.manifest["policy"].null()) 
      leave = leaving(bundle.manifest["policy"], exit, exits.size(), logits, side.state);
    std::vector<int64_t> gone, stay;
    for (int64_t i = 0; i < logits.size(0); ++i) (leave[i].item<bool>() ? gone : stay).push_back(i);
    answer(side, gone, exits.empty() ? -1 : static_cast<int>(exit), logits);
    side.keep(stay);
  }
}

static void send(const Crossing& crossing, Side& side, std::map<std::string, Message>& messages) {
  side.went.insert(crossing.tensor + "@" + crossing.target);
  auto& message = messages[crossing.target];
  message.target = crossing.target, message.rows = side.rows;
  std::map<std::string, std::vector<torch::Tensor>> arrived;
  for (size_t place = 0; place < side.rows.size(); ++place) {
    Tensors sent;
    for (auto& part : crossing.codec.parts()) {
      auto& known = crossing.state.empty() ? side.tensors.at(crossing.tensor + part) : side.state.at(crossing.state);
      sent[part] = known.narrow(0, place, 1);
    }
    std::string payload = crossing.seal(crossing.codec.encode(sent));
    std::printf("payload %s %s %ld %s\n", crossing.tensor.c_str(), crossing.target.c_str(), static_cast<long>(side.rows[place]),
                hexadecimal(payload).c_str());
    for (auto& [part, tensor] : crossing.codec.decode(crossing.opened(payload))) arrived[part].push_back(tensor);
  }
  for (auto& [part, rows] : arrived)
    (crossing.state.empty() ? message.tensors[crossing.tensor + part] : message.state[crossing.state]) = torch::cat(rows);
}

int main(int argc, char** argv) try {
  if (argc < 2) throw std::runtime_error("usage: reader BUNDLE [BITS]");
  torch::InferenceMode guard;
  Bundle bundle(argv[1], argc > 2 ? std::atoi(argv[2]) : 0);
  const Json& spec = bundle.manifest["input"];
  std::string input = spec["kind"].text == "image" ? "images" : spec["name"].text, entry;
  for (auto& part : bundle.partitions)
    if (std::count(part.inputs.begin(), part.inputs.end(), input)) entry = part.placement;
  auto images = bundle.sample(entry).at(input);
  Message request{entry, {}, {{input, images}}, {}};
  for (int64_t row = 0; row < images.size(0); ++row) request.rows.push_back(row);
  std::map<std::string, Side> sides;
  std::deque<Message> waiting = {request};
  for (; !waiting.empty(); waiting.pop_front()) {
    auto& side = sides[waiting.front().target];
    std::string here = waiting.front().target;
    arrive(side, waiting.front());
    for (auto& part : bundle.partitions) {
      bool ready = part.placement == here && !side.ran.count(part.name) && !side.rows.empty();
      for (auto& name : part.inputs) ready = ready && (bundle.settings.count(name) || side.tensors.count(name));
      if (ready) run(part, side, bundle);
    }
    std::map<std::string, Message> messages;
    for (auto& crossing : bundle.crossings)
      if (crossing.source == here && side.ran.count(crossing.producer) && !side.rows.empty() &&
          !side.went.count(crossing.tensor + "@" + crossing.target))
        send(crossing, side, messages);
    for (auto& [target, message] : messages) waiting.push_back(message);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
