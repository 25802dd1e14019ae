// Who leaves at an exit, with what answer, and what the next exit must know of it.
#pragma once
#include <torch/script.h>

#include <cmath>
#include <map>

#include "json.hpp"

using State = std::map<std::string, torch::Tensor>;  // `answered` and `agreed`, or `log_p`; one row for each sample

// Returns who leaves (B,); `logits` become the answers.
inline torch::Tensor leaving(const Json& policy, size_t exit, size_t exits, torch::Tensor& logits, State& state) {
  const std::string& kind = policy["kind"].text;
  auto everyone = torch::ones({logits.size(0)}, torch::kBool);
  if (!policy["temperatures"].null()) logits = logits / policy["temperatures"].items[exit].number;
  if (exit + 1 == exits && (kind != "ensemble" || !policy["last"].truth)) return everyone;
  if (kind == "patience") {
    auto answered = logits.argmax(1), agreed = torch::zeros_like(answered);
    if (exit > 0) {  // they may have come as float32 of shape (B, 1)
      auto before = state.at("answered").to(torch::kLong).view(-1), count = state.at("agreed").to(torch::kLong).view(-1);
      agreed = torch::where(answered == before, count + 1, agreed);
    }
    state = {{"answered", answered}, {"agreed", agreed}};
  } else if (kind == "ensemble") {
    auto log_p = logits.log_softmax(1).unsqueeze(1);
    if (exit > 0) log_p = torch::cat({state.at("log_p"), log_p}, 1);
    state = {{"log_p", log_p}};
    for (size_t i = 0; i <= exit; ++i) {
      double weight = policy["weights"].null() ? 1.0 / (exit + 1) : policy["weights"].items[exit].items[i].number;
      auto term = weight * log_p.select(1, i);
      logits = i == 0 ? term : logits + term;
    }
    if (!policy["log_bias"].null()) {
      std::vector<float> bias;
      for (auto& value : policy["log_bias"].items[exit].items) bias.push_back(static_cast<float>(value.number));
      logits = logits + torch::tensor(bias);
    }
  }
  size_t latest = policy["latest"].null() ? exits - 1 : policy["latest"].whole();
  if (exit >= latest) return everyone;
  const Json& threshold = policy["thresholds"].items[exit];
  if (threshold.null()) return ~everyone;
  if (kind == "patience") return state["agreed"] >= threshold.whole();
  auto p = logits.softmax(1);
  if (kind == "confidence" || kind == "ensemble") return p.amax(1) >= threshold.number;
  if (kind == "entropy") return (at::special_entr(p).sum(1) / std::log(p.size(1))).clamp_max(1) <= threshold.number;
  if (kind != "margin") throw std::runtime_error("this example does not know the policy " + kind);
  auto two = std::get<0>(p.topk(2, 1));
  return two.select(1, 0) - two.select(1, 1) >= threshold.number;
}
