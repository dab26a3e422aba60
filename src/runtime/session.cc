#include "runtime/session.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "checkpoint/safetensors.h"
#include "runtime/engine.h"

namespace kda {

namespace {

constexpr const char* kFormat = "kda.cpp session 1";  // raised when names, shapes or meanings change

std::string layer_tensor(size_t layer, const char* part) { return cat("layer.", layer, ".", part); }

int64_t number(const SafetensorsFile& f, const char* key) {
  const auto it = f.metadata().find(key);
  KDA_CHECK(it != f.metadata().end(), f.path().string(), ": no `", key, "` in the metadata");
  int64_t n = -1;
  const std::string& s = it->second;
  const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), n);
  KDA_CHECK(error == std::errc() && end == s.data() + s.size() && n >= 0, f.path().string(), ": metadata `", key,
            "` must be a number from 0, is \"", s, "\"");
  return n;
}

// A tensor of the file, after its dtype and shape were found to be as needed.
Tensor take(const SafetensorsFile& f, const std::string& name, Dtype dtype, const Shape& shape) {
  const Tensor t = f.tensor(name);
  KDA_CHECK(t.dtype() == dtype && t.shape() == shape, f.path().string(), ": `", name, "` must be ", name_of(dtype), " ",
            shape, ", is ", name_of(t.dtype()), " ", t.shape());
  return t;
}

// Saved files hold f32 whatever the backend keeps: bf16 goes there and back without loss.
Tensor widened(const Tensor& t) {
  if (t.dtype() == Dtype::f32) return t;
  Tensor out = host_tensor(Dtype::f32, t.shape());
  const bf16* from = t.v.as<bf16>();
  std::transform(from, from + t.shape().size(), out.v.as<float>(), [](bf16 x) { return float(x); });
  return out;
}
Tensor narrowed(const Tensor& t, Dtype to) {
  if (t.dtype() == to) return t;
  Tensor out = host_tensor(Dtype::bf16, t.shape());
  const float* from = t.v.as<float>();
  std::transform(from, from + t.shape().size(), out.v.as<bf16>(), [](float x) { return bf16(x); });
  return out;
}

}  // namespace

Session::Session(Engine& engine) : engine_(&engine) {}

Session::~Session() {
  if (engine_) engine_->free_slot(slot_);
}

Session::Session(Session&& other) noexcept
    : engine_(std::exchange(other.engine_, nullptr)),
      slot_(std::exchange(other.slot_, -1)),
      tokens_(std::move(other.tokens_)),
      processed_(other.processed_),
      prompt_length_(other.prompt_length_),
      logits_(std::move(other.logits_)) {}

Session& Session::operator=(Session&& other) noexcept {
  std::swap(engine_, other.engine_);
  std::swap(slot_, other.slot_);
  std::swap(tokens_, other.tokens_);
  std::swap(processed_, other.processed_);
  std::swap(prompt_length_, other.prompt_length_);
  std::swap(logits_, other.logits_);
  return *this;
}

void Session::push(int32_t id) {
  KDA_CHECK(!pending(), "session: a generated token is already pending");
  KDA_CHECK(id >= 0 && id < engine_->config().vocabulary, "session: token id ", id, " outside the vocabulary");
  tokens_.push_back(id);
  logits_.clear();
}

Session Session::fork() const {
  Session copy(*engine_);
  copy.tokens_ = tokens_;
  copy.processed_ = processed_;
  copy.prompt_length_ = prompt_length_;
  copy.logits_ = logits_;
  if (slot_ >= 0) {
    copy.slot_ = engine_->take_slot();
    engine_->states_->copy(engine_->ctx_, slot_, copy.slot_, processed_);
  }
  return copy;
}

std::vector<float> Session::kda_state(int64_t layer) const {
  KDA_CHECK(layer >= 0 && layer < int64_t(engine_->config().layers.size()), "kda_state: layer ", layer, " of ",
            engine_->config().layers.size());
  if (slot_ < 0) return {};
  const Tensor& pool = engine_->states_->layer(size_t(layer)).S;
  if (!pool) return {};
  const View S = StatePool::slot(pool, slot_);
  std::vector<float> out(size_t(S.size()));
  engine_->ctx_.backend->copy(engine_->ctx_, out.data(), S.data, S.bytes());
  return out;
}

void Session::save(const std::filesystem::path& path) const {
  KDA_CHECK(!engine_->fingerprint().empty(), path.string(),
            ": a session is saved with its model's fingerprint, and a model in memory has none");
  std::map<std::string, ConstView> tensors;
  std::vector<Tensor> kept;  // host copies
  const auto add = [&](const std::string& name, View from) {
    Tensor host = host_tensor(from.dtype, from.shape);
    engine_->ctx_.backend->copy(engine_->ctx_, host.v.data, from.data, from.bytes());
    kept.push_back(widened(host));
    tensors[name] = kept.back();
  };
  if (!tokens_.empty()) tensors["tokens"] = view(tokens_.data(), {int64_t(tokens_.size())});
  if (!logits_.empty()) tensors["logits"] = view(logits_.data(), {int64_t(logits_.size())});
  for (size_t l = 0; slot_ >= 0 && l < engine_->config().layers.size(); ++l) {
    const LayerState& s = engine_->states_->layer(l);
    if (s.S) {
      add(layer_tensor(l, "S"), StatePool::slot(s.S, slot_));
      add(layer_tensor(l, "window"), StatePool::slot(s.window, slot_));
    } else {
      for (const auto& [name, pool] : {std::pair{"k", &s.k}, std::pair{"v", &s.v}}) {
        View one = StatePool::slot(*pool, slot_);
        one.shape.dim[0] = processed_;
        add(layer_tensor(l, name), one);
      }
    }
  }
  save_safetensors(path, tensors,
                   {{"format", kFormat},
                    {"layout", "S [H,V,K]; window [3,2HK+HV] q|k|v oldest first; k, v [tokens,G,d]"},
                    {"fingerprint", engine_->fingerprint()},
                    {"processed", std::to_string(processed_)},
                    {"prompt_length", std::to_string(prompt_length_)}});
}

Session Session::restore(Engine& engine, const std::filesystem::path& path) {
  KDA_CHECK(!engine.fingerprint().empty(), path.string(),
            ": a saved session belongs to a model folder, and this model is in memory alone");
  const SafetensorsFile file(path);
  const auto text = [&](const char* key) {
    const auto it = file.metadata().find(key);
    return it == file.metadata().end() ? std::string("nothing") : it->second;
  };
  KDA_CHECK(text("format") == kFormat, path.string(), ": not a saved session of this version: format must be \"",
            kFormat, "\", is \"", text("format"), "\"");
  KDA_CHECK(text("fingerprint") == engine.fingerprint(), path.string(),
            ": the session of another model: its fingerprint is ", text("fingerprint"), ", this model's is ",
            engine.fingerprint());
  Session s(engine);
  s.processed_ = number(file, "processed");
  s.prompt_length_ = number(file, "prompt_length");
  if (!file.has("tokens")) {
    KDA_CHECK(s.processed_ == 0 && file.tensors().empty(), path.string(), ": has states but no `tokens`");
    return s;
  }
  const Tensor tokens = file.tensor("tokens");
  KDA_CHECK(tokens.dtype() == Dtype::i32 && tokens.shape().rank == 1, path.string(),
            ": `tokens` must be i32 [tokens], is ", name_of(tokens.dtype()), " ", tokens.shape());
  const int64_t n = tokens.shape()[0];
  KDA_CHECK(n >= 1 && (s.processed_ == n || s.processed_ == n - 1) && s.processed_ >= 1 && s.prompt_length_ <= n,
            path.string(), ": ", n, " tokens, of which ", s.processed_, " processed and ", s.prompt_length_, " given");
  const int32_t* ids = tokens.v.as<int32_t>();
  engine.check_ids({ids, size_t(n)});
  s.tokens_.assign(ids, ids + n);
  size_t used = 1;
  KDA_CHECK(file.has("logits") == !s.pending(), path.string(),
            ": `logits` must be there exactly when every token was processed");
  if (!s.pending()) {
    const Tensor logits = take(file, "logits", Dtype::f32, {engine.config().vocabulary});
    const float* p = logits.v.as<float>();
    s.logits_.assign(p, p + logits.shape().size());
    ++used;
  }
  // Everything is looked at before any memory is taken for it: a lying file costs an error, not gigabytes.
  const std::vector<LayerSpec>& layers = engine.config().layers;
  std::vector<std::vector<Tensor>> parts;
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerSpec& z = layers[l];
    const auto part = [&](const char* name, const Shape& shape) {
      return take(file, layer_tensor(l, name), Dtype::f32, shape);
    };
    if (z.mixer == Mixer::kda) {
      const int64_t H = z.kda_heads;
      parts.push_back({part("S", {H, z.V, z.K}), part("window", {3, 2 * H * z.K + H * z.V})});
    } else {
      const Shape kv{s.processed_, z.kv_heads, z.head_dim};
      parts.push_back({part("k", kv), part("v", kv)});
    }
    used += 2;
  }
  KDA_CHECK(used == file.tensors().size(), path.string(), ": holds ", file.tensors().size(),
            " tensors, this model's session has ", used);
  s.slot_ = engine.take_slot();
  engine.ready(1, 1, n);
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerState& state = engine.states_->layer(l);
    const Tensor* pools[] = {state.S ? &state.S : &state.k, state.S ? &state.window : &state.v};
    for (size_t i = 0; i < 2; ++i) {
      const Tensor part = narrowed(parts[l][i], pools[i]->dtype());
      engine.ctx_.backend->copy(engine.ctx_, StatePool::slot(*pools[i], s.slot_).data, part.v.data, part.v.bytes());
    }
  }
  return s;
}

}  // namespace kda
