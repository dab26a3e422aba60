// Keys of a stage, of its losses and of its rates.
#include <cctype>

#include "train/run_key_makers.h"

namespace kda::run_keys {

namespace {
void read_layers(StageSpec& s, const Yaml& y) {
  s.layers.clear();
  s.all_layers = y.kind == Yaml::Kind::null || (y.kind == Yaml::Kind::scalar && y.text == "all");
  if (s.all_layers) return;
  KDA_CHECK(y.kind == Yaml::Kind::list && !y.items.empty(), y.where,
            ": layer_mapping must be `all` or a list of [student, teacher] or of single numbers, is ", show(y));
  for (const Yaml& item : y.items) {
    KDA_CHECK(item.kind != Yaml::Kind::list || item.items.size() == 2, item.where,
              ": an entry of layer_mapping must be one number or [student, teacher], is ", show(item));
    const bool pair = item.kind == Yaml::Kind::list;
    s.layers.push_back({whole(pair ? item.items[0] : item, "layer_mapping", 0, 1 << 20),
                        whole(pair ? item.items[1] : item, "layer_mapping", 0, 1 << 20)});
  }
}

Yaml show_layers(const StageSpec& s) {
  if (s.all_layers) return scalar("all");
  Yaml y;
  y.kind = Yaml::Kind::list;
  for (const LayerPair& p : s.layers) {
    Yaml pair;
    pair.kind = Yaml::Kind::list;
    pair.items = {scalar(std::to_string(p.student)), scalar(std::to_string(p.teacher))};
    y.items.push_back(pair);
  }
  return y;
}

// A module's name, as a regex for the parameters below it.
std::string below(const std::string& module) {
  std::string out = "^";
  for (const char c : module) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_') out += '\\';
    out += c;
  }
  return out + "(\\.|$)";
}

}  // namespace

// ---- the tables

const Keys<LossSpec>& loss_keys() {
  static const Keys<LossSpec> keys = {
      choice<LossSpec, LossFunction>(
          "function", {}, &LossSpec::function,
          {{"cross_entropy", LossFunction::cross_entropy},
           {"kl", LossFunction::kl},
           {"jsd", LossFunction::jsd},
           {"tvd", LossFunction::tvd},
           {"hinge", LossFunction::hinge},
           {"logistic_ranking", LossFunction::logistic_ranking},
           {"hs_mse", LossFunction::hs_mse},
           {"hs_cosine", LossFunction::hs_cosine},
           {"mixer_mse", LossFunction::mixer_mse}},
          "cross_entropy, kl, jsd, tvd, hinge, logistic_ranking, hs_mse, hs_cosine or mixer_mse"),
      real("weight", {}, &LossSpec::weight, 0, 1e9, "total = sum(weight * loss) / sum(weight)"),
      {"temperature",
       {},
       "kl, jsd, tvd: obligatory there",
       [](LossSpec& l, const Yaml& y, Notes&) { l.temperature = number(y, "temperature", 1e-3, 1e3); },
       [](const LossSpec& l) {
         return l.function == LossFunction::kl || l.function == LossFunction::jsd || l.function == LossFunction::tvd
                    ? number_scalar(l.temperature)
                    : Yaml{};
       }},
      choice<LossSpec, MissingProbability>(
          "missing_probability_handling", {}, &LossSpec::missing,
          {{"zero", MissingProbability::zero}, {"symmetric_uniform", MissingProbability::symmetric_uniform}},
          "stored teachers: zero or symmetric_uniform"),
      {"margin",
       {},
       "hinge: obligatory there",
       [](LossSpec& l, const Yaml& y, Notes&) { l.margin = number(y, "margin", 0, 1e6); },
       [](const LossSpec& l) { return l.function == LossFunction::hinge ? number_scalar(l.margin) : Yaml{}; }},
      harmless<LossSpec>("sparse_chunk_length", "the head and its losses always run in chunks"),
  };
  return keys;
}

const Keys<RateSpec>& rate_keys() {
  static const Keys<RateSpec> keys = {
      text("match", {}, &RateSpec::match, "regex, found anywhere in a parameter's name"),
      real("learning_rate", {"lr"}, &RateSpec::lr, 0, 1e3, "instead of the stage's"),
      real("weight_decay", {}, &RateSpec::decay, 0, 1e3, "instead of the stage's"),
  };
  return keys;
}

const Keys<StageSpec>& stage_keys() {
  static const Keys<StageSpec> keys = [] {
    using S = StageSpec;
    const auto schedule = lift<S, ScheduleSpec>(
        {choice<ScheduleSpec, ScheduleKind>(
             "lr_scheduler_type", {"schedule"}, &ScheduleSpec::kind,
             {{"linear", ScheduleKind::linear},
              {"cosine", ScheduleKind::cosine},
              {"constant", ScheduleKind::constant},
              {"wsd", ScheduleKind::wsd},
              {"constant_with_warmup", ScheduleKind::constant},
              {"cosine_with_min_lr", ScheduleKind::cosine},
              {"warmup_stable_decay", ScheduleKind::wsd}},
             "linear, cosine, constant or wsd (constant, then falling); each after the warm-up"),
         real("min_lr_ratio", {}, &ScheduleSpec::min_ratio, 0, 1, "the rate at the end, as a share of the peak"),
         real("decay_ratio", {}, &ScheduleSpec::decay_ratio, 0, 1, "wsd: share of the steps that fall"),
         real("warmup_ratio", {}, &ScheduleSpec::warmup_ratio, 0, 1, "share of the steps"),
         count("warmup_steps", {}, &ScheduleSpec::warmup_steps, 0, kMost, "above 0: instead of the share")},
        &S::schedule);
    Keys<S> k = {
        text("name", {}, &S::name, "in metrics.jsonl and reports"),
        {"losses",
         {"loss_functions"},
         "list, see Losses",
         [](S& s, const Yaml& y, Notes& n) { s.losses = read_list(y, loss_keys(), "losses", n); },
         [](const S& s) { return show_list(s.losses, loss_keys()); }},
        {"layer_mapping",
         {},
         "hs_mse, hs_cosine: `all` (the output of every layer), or a list of layers or of [student, "
         "teacher]; 0 is the embedding, L the output of layer L",
         [](S& s, const Yaml& y, Notes&) { read_layers(s, y); },
         show_layers},
        regexes("trainable", {}, &S::trainable,
                "regexes of parameters to train; default: all, or with mixer_mse alone "
                "the KDA mixers"),
        {"frozen_res",
         {"frozen"},
         "regexes of parameters to leave as they are, whatever `trainable` says",
         [](S& s, const Yaml& y, Notes&) {  // beside what frozen_modules names
           for (const auto& r : words(y, "frozen_res")) s.frozen.push_back(r);
         },
         [](const S& s) { return show_words(s.frozen); }},
        {"frozen_modules",
         {},
         "the same by module: model.embed_tokens",
         [](S& s, const Yaml& y, Notes&) {
           for (const auto& m : words(y, "frozen_modules")) s.frozen.push_back(below(m));
         },
         nullptr},
        {"rates",
         {},
         "list, see Rates: the first that matches a parameter decides",
         [](S& s, const Yaml& y, Notes& n) { s.rates = read_list(y, rate_keys(), "rates", n); },
         [](const S& s) { return show_list(s.rates, rate_keys()); }},
        count("sequence_length", {}, &S::sequence_length, 2, 1 << 26,
              "obligatory: rows are cut into pieces of at most so many tokens"),
        count("batch_size", {"per_device_train_batch_size"}, &S::batch_size, 1, 1 << 26,
              "obligatory: a batch has batch_size * sequence_length tokens, without padding"),
        count("gradient_accumulation_steps", {"accumulate"}, &S::accumulate, 1, 1 << 26,
              "batches to one optimizer step"),
        count("tokens", {}, &S::tokens, 0, kMost, "length of the stage, rounded up to whole steps"),
        {"max_steps",
         {"steps"},
         "length of the stage in optimizer steps",
         [](S& s, const Yaml& y, Notes&) { s.steps = std::max<int64_t>(0, whole(y, "max_steps", -1, kMost)); },
         [](const S& s) { return scalar(std::to_string(s.steps)); }},
        real("num_train_epochs", {"epochs"}, &S::epochs, 0, 1e6, "length of the stage, when max_steps is not given"),
        real("learning_rate", {"lr"}, &S::lr, 0, 1e3, "obligatory: at the schedule's peak"),
    };
    append(k, schedule);
    append<S>(
        k, {
               real("weight_decay", {}, &S::decay, 0, 1e3, "of matrices; norms, biases, A_log and dt_bias have none"),
               real("adam_beta1", {"beta1"}, &S::beta1, 0, 0.9999999, "AdamW"),
               real("adam_beta2", {"beta2"}, &S::beta2, 0, 0.9999999, "AdamW"),
               real("adam_epsilon", {"eps"}, &S::eps, 0, 1, "AdamW"),
               real("max_grad_norm", {"clip"}, &S::clip, 0, 1e9, "gradients are scaled down to this norm; 0: never"),
               yes_no("gradient_checkpointing", {"recompute"}, &S::recompute,
                      "keep only each layer's input and compute the rest again: less memory, a third more work"),
           });
    return k;
  }();
  return keys;
}

}  // namespace kda::run_keys
