#include "kernels/loss.h"

#include "kernels/top_k.h"

namespace kda {

namespace {
const char* name(LossKind k) {
  switch (k) {
    case LossKind::cross_entropy: return "cross_entropy";
    case LossKind::kl: return "kl";
    case LossKind::jsd: return "jsd";
    case LossKind::tvd: return "tvd";
    case LossKind::hinge: return "hinge";
    case LossKind::logistic_ranking: return "logistic_ranking";
  }
  return "?";
}

void rows_of_ids(const char* op, const char* what, const ConstView& v, const Shape& shape) {
  KDA_CHECK(v.dtype == Dtype::i32 && v.shape == shape, op, ": ", what, " must be i32 ", shape, ", got ",
            name_of(v.dtype), " ", v.shape);
}
}  // namespace

void logits_loss(Context& ctx, const LogitsLoss& a) {
  KDA_CHECK(a.logits.shape.rank == 2 && a.logits.dim(1) >= 1, "logits_loss: logits must be [R,V], V >= 1, got ",
            a.logits.shape);
  const int64_t R = a.logits.dim(0), V = a.logits.dim(1);
  const bool dense = a.teacher.data, sparse = a.ids.data;
  KDA_CHECK(!(dense && sparse),
            "logits_loss: the teacher is either dense (teacher) or sparse (ids, logprobs), got both");
  KDA_CHECK(!dense || (a.teacher.shape == a.logits.shape && a.teacher.dtype == a.logits.dtype),
            "logits_loss: teacher must be ", name_of(a.logits.dtype), " ", a.logits.shape, " as logits are, got ",
            name_of(a.teacher.dtype), " ", a.teacher.shape);
  if (sparse) {
    KDA_CHECK(a.ids.shape.rank == 2 && a.ids.dim(1) >= 1 && a.ids.dim(1) <= V, "logits_loss: ids must be [", R,
              ",k], 1 <= k <= ", V, ", got ", a.ids.shape);
    rows_of_ids("logits_loss", "ids", a.ids, {R, a.ids.dim(1)});
    KDA_CHECK(a.logprobs.data && a.logprobs.shape == a.ids.shape, "logits_loss: logprobs must be ", a.ids.shape,
              " as ids are, got ", a.logprobs.shape);
  }
  rows_of_ids("logits_loss", "labels", a.labels, {R});
  KDA_CHECK(!a.terms.empty(), "logits_loss: needs at least one term");
  KDA_CHECK((a.value.shape == Shape{int64_t(a.terms.size()), R}), "logits_loss: value must be [", a.terms.size(), ",",
            R, "], got ", a.value.shape);
  for (const LossTerm& t : a.terms) {
    KDA_CHECK(t.temperature > 0 && t.temperature < 1e6f, "logits_loss: ", name(t.kind),
              ": temperature must be above 0, got ", t.temperature);
    const bool ranking = t.kind == LossKind::hinge || t.kind == LossKind::logistic_ranking;
    KDA_CHECK(!ranking || sparse, "logits_loss: ", name(t.kind),
              " compares the teacher's likeliest ids: it needs ids and logprobs (a stored or top-k teacher)");
    KDA_CHECK(t.kind == LossKind::cross_entropy || dense || sparse, "logits_loss: ", name(t.kind), " needs a teacher");
  }
  body(ctx, ctx.backend->logits_loss, "logits_loss")(ctx, a);
}

void hidden_loss(Context& ctx, const HiddenLoss& a) {
  const Shape& s = a.student.shape;
  KDA_CHECK(s.rank == 2 && s[1] >= 1, "hidden_loss: student must be [R,D], D >= 1, got ", s);
  KDA_CHECK(a.teacher.shape == s && a.d_student.shape == s, "hidden_loss: teacher and d_student must be ", s,
            " as student is, got ", a.teacher.shape, " and ", a.d_student.shape);
  rows_of_ids("hidden_loss", "labels", a.labels, {s[0]});
  KDA_CHECK(a.value.shape == Shape{s[0]}, "hidden_loss: value must be [", s[0], "], got ", a.value.shape);
  body(ctx, ctx.backend->hidden_loss, "hidden_loss")(ctx, a);
}

void top_k(Context& ctx, const TopK& a) {
  KDA_CHECK(a.logits.shape.rank == 2, "top_k: logits must be [R,V], got ", a.logits.shape);
  const int64_t R = a.logits.dim(0), V = a.logits.dim(1);
  KDA_CHECK(a.ids.shape.rank == 2 && a.ids.dim(0) == R && a.ids.dim(1) >= 1 && a.ids.dim(1) <= V,
            "top_k: ids must be [", R, ",k], 1 <= k <= ", V, ", got ", a.ids.shape);
  rows_of_ids("top_k", "ids", a.ids, {R, a.ids.dim(1)});
  KDA_CHECK(a.logprobs.shape == a.ids.shape, "top_k: logprobs must be ", a.ids.shape, " as ids are, got ",
            a.logprobs.shape);
  body(ctx, ctx.backend->top_k, "top_k")(ctx, a);
}

}  // namespace kda
