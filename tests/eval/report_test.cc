// metrics.jsonl read back, and the page made of it.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "eval/metrics.h"
#include "eval/report.h"

namespace kda::test {
namespace {

using nlohmann::json;

const std::string kTwo =
    R"({"kind":"train","stage":"align","step":1,"tokens":64,"seconds":0.5,"tok_per_s":128,"loss":0.8,"terms":{"mixer_mse":0.8},"layers":{"mixer_mse":[0.7,0.9]},"lr":0.001,"grad_norm":0.4})"
    "\n"
    R"({"kind":"train","stage":"kl","step":2,"tokens":128,"seconds":1.0,"tok_per_s":130,"loss":null,"terms":{"kl":2.5},"lr":0.001,"grad_norm":null})"
    "\n"
    R"({"kind":"eval","stage":"kl","step":2,"tokens":128,"seconds":1.1,"terms":{"kl":2.25,"loss":2.3},"top1":0.5,"probes":{"needle_1key":0.75}})"
    "\n"
    R"({"kind":"event","stage":"kl","step":2,"what":"skipped","why":"loss is not finite","rows":[3,4]})"
    "\n";

std::string error_of(const std::string& text) {
  try {
    parse_metrics(text, "run/metrics.jsonl");
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Metrics, ReadsColumnsWithGaps) {
  const Metrics m = parse_metrics(kTwo, "m");
  EXPECT_EQ(m.train.step, (std::vector<double>{1, 2}));
  EXPECT_EQ(m.train.stage, (std::vector<std::string>{"align", "kl"}));
  EXPECT_EQ(m.train.values.at("loss")[0], 0.8);
  EXPECT_TRUE(std::isnan(m.train.values.at("loss")[1]));
  EXPECT_TRUE(std::isnan(m.train.terms.at("kl")[0]));
  EXPECT_EQ(m.train.terms.at("kl")[1], 2.5);
  ASSERT_EQ(m.train.layers.at("mixer_mse").size(), 2u);
  EXPECT_EQ(m.train.layers.at("mixer_mse").at(1)[0], 0.9);
  EXPECT_EQ(m.train.layers.at("mixer_mse").at(1).size(), 2u);
  EXPECT_EQ(m.eval.probes.at("needle_1key"), (std::vector<double>{0.75}));
  EXPECT_EQ(m.eval.values.at("top1"), (std::vector<double>{0.5}));
  EXPECT_EQ(m.eval.values.at("loss"), (std::vector<double>{2.3}));
  EXPECT_EQ(m.eval.terms.count("loss"), 0u);
  ASSERT_EQ(m.events.size(), 1u);
  EXPECT_EQ(m.events[0].rows, "[3,4]");
  EXPECT_FALSE(m.unfinished);
}

TEST(Metrics, ARunThatGoesOnEndsInHalfALine) {
  for (size_t n = 1; n < 60; ++n) {
    const Metrics m = parse_metrics(kTwo + kTwo.substr(0, n), "m");
    EXPECT_TRUE(m.unfinished) << n;
    EXPECT_EQ(m.train.size(), 2u);
  }
  EXPECT_EQ(parse_metrics("", "m").train.size(), 0u);
  EXPECT_EQ(parse_metrics(kTwo + R"({"kind":"of another day"})" + "\n", "m").unknown, 1);
}

TEST(Metrics, ErrorsNameFileAndLine) {
  EXPECT_NE(error_of(kTwo + "{\"kind\":\"tra\n").find("run/metrics.jsonl line 5"), std::string::npos);
  EXPECT_NE(error_of("\n"
                     R"({"kind":"train","step":"x","tokens":1,"seconds":1})"
                     "\n")
                .find("line 2: needed a number `step`"),
            std::string::npos);
  EXPECT_NE(error_of(R"({"step":1})"
                     "\n")
                .find("line 1: needed a string `kind`"),
            std::string::npos);
  EXPECT_NE(error_of(R"({"kind":"eval","step":1,"tokens":1,"seconds":1,"terms":{"kl":"a"}})"
                     "\n")
                .find("`terms.kl`"),
            std::string::npos);
  EXPECT_NE(error_of(R"({"kind":"eval","step":1,"tokens":1,"seconds":1,"layers":{"kl":2}})"
                     "\n")
                .find("`layers.kl`"),
            std::string::npos);
}

TEST(Metrics, AStepDoneTwiceCountsOnce) {
  std::string text;
  for (int step : {1, 2, 3, 2, 3, 4})
    text += json{{"kind", "train"}, {"stage", "s"},    {"step", step},
                 {"tokens", step},  {"seconds", step}, {"loss", double(text.size())}}
                .dump() +
            "\n";
  const Metrics m = parse_metrics(text, "m");
  EXPECT_EQ(m.train.step, (std::vector<double>{1, 2, 3, 4}));
  const auto& loss = m.train.values.at("loss");
  ASSERT_EQ(loss.size(), 4u);
  EXPECT_LT(loss[0], loss[1]);
  EXPECT_LT(loss[1], loss[2]);
}

TEST(Metrics, ThinningKeepsMeansAndStages) {
  MetricColumns c;
  for (int i = 0; i < 1000; ++i) {
    c.step.push_back(i + 1);
    c.tokens.push_back(10 * (i + 1));
    c.seconds.push_back(i);
    c.stage.push_back(i < 333 ? "a" : "b");
    c.values["loss"].push_back(i % 2 ? std::nan("") : i);
  }
  const MetricColumns t = thinned(c, 100);
  EXPECT_LE(t.size(), 102u);
  EXPECT_EQ(t.step.back(), 1000);
  EXPECT_EQ(t.stage[33], "a");
  EXPECT_EQ(t.step[33], 333);
  EXPECT_EQ(t.stage[34], "b");
  EXPECT_EQ(t.values.at("loss")[0], (0 + 2 + 4 + 6 + 8) / 5.0);
  EXPECT_EQ(t.values.at("loss").size(), t.size());
  EXPECT_EQ(thinned(c, 1000).size(), 1000u);
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

json data_of(const std::string& page) {
  const std::string open = "<script id=\"data\" type=\"application/json\">";
  const size_t from = page.find(open) + open.size();
  return json::parse(page.substr(from, page.find("</script>", from) - from));
}

TEST(Report, HoldsEveryRunAndEscapesEverything) {
  const std::string evil = "</script><script>alert('x')</script>&\"{{data}}";
  std::string metrics = kTwo;
  metrics +=
      json{{"kind", "event"}, {"step", 2}, {"stage", evil}, {"what", evil}, {"why", evil}, {"rows", {evil}}}.dump() +
      "\n";
  metrics += json{{"kind", "train"},
                  {"stage", evil},
                  {"step", 3},
                  {"tokens", 3},
                  {"seconds", 3},
                  {"terms", {{evil, 1.0}}},
                  {"layers", {{evil, {1, 2}}}}}
                 .dump() +
             "\n";
  metrics += json{{"kind", "eval"},         {"stage", evil},          {"step", 3}, {"tokens", 3}, {"seconds", 3},
                  {"terms", {{evil, 1.0}}}, {"probes", {{evil, 1.0}}}}
                 .dump() +
             "\n";
  const std::string page = report_page({{evil, metrics, "m", evil}, {"second", kTwo, "n", ""}}, evil);
  EXPECT_EQ(count(page, "<script"), 2u);
  EXPECT_EQ(count(page, "</script>"), 2u);
  EXPECT_TRUE(page.ends_with("</html>\n"));
  const json data = data_of(page);
  ASSERT_EQ(data.size(), 2u);
  EXPECT_EQ(data[0]["name"], evil);
  EXPECT_EQ(data[0]["train"]["series"]["terms." + evil], json({nullptr, nullptr, 1}));
  EXPECT_EQ(data[1]["train"]["tokens"], json({64, 128}));
  EXPECT_EQ(data[1]["train"]["series"]["loss"], json({0.8, nullptr}));
  EXPECT_EQ(data[1]["train"]["layers"]["mixer_mse"][1], json({0.9, nullptr}));
  EXPECT_EQ(data[1]["eval"]["series"]["probes.needle_1key"], json({0.75}));
  // Nothing is loaded from anywhere.
  for (const char* outside : {"http://", "https://", "src=", "href=", "@import", "url("})
    EXPECT_EQ(count(page, outside), std::string(outside) == "http://" ? 1u : 0u)
        << outside;  // the one is SVG's namespace
}

TEST(Report, ARunWithoutMeasurementsIsSaidToHaveNone) {
  const std::string page = report_page({{"fresh", "", "m", ""}}, "fresh");
  EXPECT_NE(page.find("fresh: no measurement yet."), std::string::npos);
  EXPECT_EQ(data_of(page)[0]["train"]["step"], json::array());
}

}  // namespace
}  // namespace kda::test
