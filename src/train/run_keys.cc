// Keys of the run as a whole.
#include "train/run_keys.h"

#include "train/run_key_makers.h"

namespace kda::run_keys {

namespace {
const Choices<OnTrouble> kOnNan = {{"stop", OnTrouble::stop}, {"skip", OnTrouble::skip}};
const Choices<OnTrouble> kOnSpike = {
    {"stop", OnTrouble::stop}, {"skip", OnTrouble::skip}, {"ignore", OnTrouble::ignore}};

// HF's optimizers that are AdamW with fp32 states.
const Names kAdamW = {"adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"};

// A key of the whole run may stand in several places, but only once.
Key<Draft> once(Key<Draft> k) {
  k.read = [name = k.name, read = k.read](Draft& d, const Yaml& y, Notes& n) {
    const auto [at, fresh] = d.given.emplace(name, y.where);
    KDA_CHECK(fresh, y.where, ": '", name, "' was given before, at ", at->second, "; give it once");
    read(d, y, n);
  };
  return k;
}

Keys<Draft> once(Keys<Draft> keys) {
  for (auto& k : keys)
    if (k.show) k = once(std::move(k));
  return keys;
}

// Keys of a stage, given outside of `stages`: for all of them.
Keys<Draft> stage_defaults() {
  Keys<Draft> keys = once(lift<Draft, StageSpec>(stage_keys(), &Draft::base));
  for (auto& k : keys) k.show = nullptr;  // each stage shows its own
  keys.erase(std::remove_if(keys.begin(), keys.end(), [](const auto& k) { return k.name == "name"; }), keys.end());
  return keys;
}
}  // namespace

const Keys<DatasetSpec>& one_dataset_keys() {
  static const Keys<DatasetSpec> keys = [] {
    using D = DatasetSpec;
    const std::string hub =
        "export it once:  python3 tools/export_dataset.py NAME --split SPLIT -o train.jsonl  and give "
        "the file as path";
    return Keys<D>{
        text("path", {"disk_path"}, &D::path,
             "file or folder: .jsonl, .txt, token shards, or one written by kda capture"),
        text("text_key", {}, &D::text_key, "JSON key that holds the text"),
        real("weight", {}, &D::weight, 0, 1e9, "share of the tokens in a mixture; give it to all or to none (by size)"),
        choice<D, bool>("excess_length_strategy", {}, &D::drop_long, {{"split", false}, {"drop", true}},
                        "split: rows are cut into pieces of sequence_length, and where a batch is full; drop: rows "
                        "longer than sequence_length are left out, the others never cut"),
        refused<D>("repo_id", hub),
        refused<D>("split", hub),
        refused<D>("revision", hub),
        refused<D>("config_name", hub),
    };
  }();
  return keys;
}

const Keys<TeacherSpec>& teacher_keys() {
  static const Keys<TeacherSpec> keys = {
      choice<TeacherSpec, TeacherKind>("kind", {}, &TeacherSpec::kind,
                                       {{"hf", TeacherKind::live}, {"dataset", TeacherKind::stored}},
                                       "hf: a model folder, run beside the student; dataset: the training data are a "
                                       "folder written by kda capture"),
      text("path", {}, &TeacherSpec::path, "hf: model folder, or owner/name in the local Hugging Face cache"),
      harmless<TeacherSpec>("kwargs", "how the model is loaded follows from its files"),
      {"top_k",
       {},
       "hf: only so many of its likeliest ids count; default: all",
       [](TeacherSpec& t, const Yaml& y, Notes&) {
         t.top_k = y.kind == Yaml::Kind::null ? 0 : whole(y, "top_k", 1, 4096);
       },
       [](const TeacherSpec& t) { return t.top_k ? scalar(std::to_string(t.top_k)) : Yaml{}; }},
      {"logprob_compressor",
       {},
       "dataset: how Parquet rows are packed; a folder of kda capture says so itself",
       [](TeacherSpec& t, const Yaml& y, Notes&) { t.codec = y.kind == Yaml::Kind::null ? "" : to_json(y); },
       [](const TeacherSpec& t) { return t.codec.empty() ? Yaml{} : scalar(t.codec); }},  // JSON is YAML
      refused<TeacherSpec>("legacy_logit_compression", "read such rows with DistillKit, or capture them again"),
  };
  return keys;
}

const Keys<ProbeSpec>& probe_keys() {
  static const Keys<ProbeSpec> keys = {
      text("needles", {}, &ProbeSpec::needles, "file of needle questions"),
      count("needle_keys", {}, &ProbeSpec::needle_keys, 0, 1 << 20, "only questions with so many keys; 0: any"),
      count("needle_max_chars", {}, &ProbeSpec::needle_max_chars, 0, kMost,
            "only prompts of at most so many characters; 0: any"),
      count("needle_limit", {}, &ProbeSpec::needle_limit, 0, kMost, "at most so many questions; 0: all"),
      text("arithmetic", {}, &ProbeSpec::arithmetic, "file of arithmetic questions"),
      count("arithmetic_limit", {}, &ProbeSpec::arithmetic_limit, 0, kMost, "at most so many questions; 0: all"),
  };
  return keys;
}

const Keys<RunFile>& eval_keys() {
  static const Keys<RunFile> keys = [] {
    using E = EvalSpec;
    Keys<E> k = {
        count("every", {}, &E::every, 0, kMost, "steps; 0: at the start and at the ends of stages"),
        count("tokens", {}, &E::tokens, 0, kMost, "of held-out text at most; 0: all"),
        count("sequence_length", {}, &E::sequence_length, 0, 1 << 26, "0: each stage's"),
        yes_no("only_first", {}, &E::only_first, "of each row only its first sequence_length tokens"),
        count("probes_every", {}, &E::probes_every, 0, kMost, "steps; 0: at the start and at the ends of stages"),
        {"probes",
         {},
         "see Probes",
         [](E& e, const Yaml& y, Notes& n) { read_map(e.probes, y, probe_keys(), "eval.probes", n); },
         [](const E& e) { return show_map(e.probes, probe_keys()); }},
    };
    return lift<RunFile, E>(k, &RunFile::eval);
  }();
  return keys;
}

const Keys<RunFile>& checkpoint_keys() {
  static const Keys<RunFile> keys = {
      count("save_steps", {}, &RunFile::save_every, 0, kMost,
            "steps between checkpoints; 0: only at the ends of stages"),
      count("save_total_limit", {"keep_last"}, &RunFile::keep_last, 1, kMost,
            "so many of the last ones are kept, besides the best"),
      text("best_by", {"metric_for_best_model"}, &RunFile::best_by,
           "held-out term the best checkpoint is chosen by: kl, cross_entropy, loss, .. (least), or top1 (most)"),
  };
  return keys;
}

const Keys<Draft>& dataset_keys() {
  static const Keys<Draft> keys = [] {
    Keys<Draft> k = {
        {"train_dataset",
         {},
         "see One data set; or a list of them, which are mixed",
         [](Draft& d, const Yaml& y, Notes& n) {
           d.run.datasets.clear();
           if (y.kind == Yaml::Kind::list)
             d.run.datasets = read_list(y, one_dataset_keys(), "dataset.train_dataset", n);
           else
             read_map(d.run.datasets.emplace_back(), y, one_dataset_keys(), "dataset.train_dataset", n);
         },
         [](const Draft& d) { return show_list(d.run.datasets, one_dataset_keys()); }},
        {"eval_dataset",
         {},
         "see One data set: held-out text",
         [](Draft& d, const Yaml& y, Notes& n) {
           if (y.kind == Yaml::Kind::null) return;
           read_map(d.run.eval.dataset.emplace(), y, one_dataset_keys(), "dataset.eval_dataset", n);
         },
         [](const Draft& d) {
           return d.run.eval.dataset ? show_map(*d.run.eval.dataset, one_dataset_keys()) : Yaml{};
         }},
    };
    Keys<RunFile> run = {
        count("num_samples", {}, &RunFile::dataset_rows, 0, kMost,
              "train on at most so many rows, drawn by seed; 0: all"),
        text("prepared_dataset_path", {"cache"}, &RunFile::cache,
             "folder for tokens; default: kda's cache folder of the user"),
        harmless<RunFile>("prepacked", "rows of token ids are taken as they are"),
        refused<RunFile>("eos_label_token_ids", "labels are the next tokens; export the data with the ids you want"),
    };
    append(k, lift<Draft, RunFile>(run, &Draft::run));
    k.push_back({"num_eval_samples",
                 {},
                 "without eval_dataset: so many training rows are held out, drawn by seed",
                 [](Draft& d, const Yaml& y, Notes&) { d.run.eval.rows = whole(y, "num_eval_samples", 0, kMost); },
                 [](const Draft& d) { return scalar(std::to_string(d.run.eval.rows)); }});
    k.push_back({"seed",
                 {},
                 "the run's",
                 [](Draft& d, const Yaml& y, Notes&) { d.run.seed = uint64_t(whole(y, "seed", 0, kMost)); },
                 nullptr});
    return k;
  }();
  return keys;
}

const Keys<Draft>& training_args_keys() {
  static const Keys<Draft> keys = [] {
    using R = RunFile;
    Keys<Draft> k = stage_defaults();
    append(k, once(lift<Draft, R>(checkpoint_keys(), &Draft::run)));
    const Keys<R> run = {
        count("logging_steps", {}, &R::log_every, 1, kMost, "steps between lines of metrics.jsonl"),
        {"eval_steps",
         {},
         "eval.every",
         [](R& r, const Yaml& y, Notes&) { r.eval.every = whole(y, "eval_steps", 0, kMost); },
         [](const R&) { return Yaml{}; }},
    };
    append(k, once(lift<Draft, R>(run, &Draft::run)));
    for (auto& key : k) key.show = nullptr;
    for (const char* name : {"seed", "data_seed"})
      k.push_back({name,
                   {},
                   "the run's seed",
                   [name](Draft& d, const Yaml& y, Notes&) { d.run.seed = uint64_t(whole(y, name, 0, kMost)); },
                   nullptr});
    k.push_back({"optim",
                 {},
                 "AdamW with fp32 states: adamw_torch and its kin; any other is refused",
                 [](Draft&, const Yaml& y, Notes&) {
                   const std::string w = word(y, "optim");
                   KDA_CHECK(std::find(kAdamW.begin(), kAdamW.end(), w) != kAdamW.end(), y.where, ": optim ", show(y),
                             " cannot be honoured: here is AdamW with fp32 states (adamw_torch)");
                 },
                 nullptr});
    for (const auto& [name, why] : std::vector<std::pair<const char*, const char*>>{
             {"bf16", "`precision` says how products are taken"},
             {"fp16", "`precision` says how products are taken"},
             {"tf32", "`precision` says how products are taken"},
             {"gradient_checkpointing_kwargs", "there is one way"},
             {"output_dir", "output_path says where"},
             {"report_to", "metrics.jsonl and `kda report` show the run"},
             {"run_name", "metrics.jsonl and `kda report` show the run"},
             {"logging_dir", "metrics.jsonl and `kda report` show the run"},
             {"logging_strategy", "logging_steps says when"},
             {"logging_first_step", "the first step is always written"},
             {"dataloader_num_workers", "data are mapped, not loaded by workers"},
             {"dataloader_pin_memory", "data are mapped, not loaded by workers"},
             {"per_device_eval_batch_size", "evaluation takes the stage's batches"},
             {"remove_unused_columns", "only the text or the ids are read"},
             {"dataset_num_proc", "`threads` says how many"},
             {"dataset_text_field", "dataset.train_dataset.text_key says which"},
             {"packing", "batches are always packed, without padding"},
             {"ddp_find_unused_parameters", "one process trains"},
             {"save_safetensors", "it is always so"},
             {"save_only_model", "a checkpoint holds all that --resume needs"},
             {"disable_tqdm", "the progress bar is for terminals only"},
         })
      k.push_back(harmless<Draft>(name, why));
    k.push_back(refused<Draft>("resume_from_checkpoint", "give --resume on the command line", {"null"}));
    k.push_back(refused<Draft>("lr_scheduler_kwargs", "min_lr_ratio and decay_ratio say it here"));
    k.push_back(refused<Draft>("label_smoothing_factor", "it would change the loss"));
    k.push_back(refused<Draft>("neftune_noise_alpha", "it would change the input"));
    k.push_back(refused<Draft>("group_by_length", "the order is drawn by seed"));
    k.push_back(refused<Draft>("completion_only_loss", "every token of a row is learned"));
    k.push_back(refused<Draft>("assistant_only_loss", "every token of a row is learned"));
    k.push_back(refused<Draft>("push_to_hub", "the final folder lies in output_path"));
    k.push_back(refused<Draft>("save_strategy", "save_steps says when", {"steps"}));
    k.push_back(refused<Draft>("eval_strategy", "eval.every (eval_steps) says when", {"steps", "no"}));
    k.push_back(refused<Draft>("evaluation_strategy", "eval.every (eval_steps) says when", {"steps", "no"}));
    k.push_back(refused<Draft>("load_best_model_at_end", "best/ is kept beside final/"));
    k.push_back(refused<Draft>("deepspeed", "one process trains"));
    k.push_back(refused<Draft>("fsdp", "one process trains"));
    return k;
  }();
  return keys;
}

const Keys<Draft>& top_keys() {
  static const Keys<Draft> keys = [] {
    using R = RunFile;
    const Keys<R> first = {
        text("project_name", {}, &R::project_name, "a name for reports"),
        text("model", {}, &R::model,
             "the student: a model folder (from kda convert), or owner/name in the local cache"),
        text("output_path", {}, &R::output, "folder of checkpoints, metrics.jsonl, run.yaml and the final model"),
    };
    Keys<Draft> k = once(lift<Draft, R>(first, &Draft::run));
    k.push_back({"dataset",
                 {},
                 "see Data",
                 [](Draft& d, const Yaml& y, Notes& n) { read_map(d, y, dataset_keys(), "dataset", n); },
                 [](const Draft& d) { return show_map(d, dataset_keys()); }});
    k.push_back({"teacher",
                 {},
                 "see Teacher",
                 [](Draft& d, const Yaml& y, Notes& n) {
                   if (y.kind == Yaml::Kind::null) return;
                   d.run.teacher.kind = TeacherKind::live;
                   read_map(d.run.teacher, y, teacher_keys(), "teacher", n);
                 },
                 [](const Draft& d) {
                   return d.run.teacher.kind == TeacherKind::none ? Yaml{} : show_map(d.run.teacher, teacher_keys());
                 }});
    k.push_back({"checkpoints",
                 {},
                 "see Checkpoints",
                 [](Draft& d, const Yaml& y, Notes& n) {
                   read_map(d, y, once(lift<Draft, R>(checkpoint_keys(), &Draft::run)), "checkpoints", n);
                 },
                 [](const Draft& d) { return show_map(d.run, checkpoint_keys()); }});
    const Keys<R> run = {
        {"eval",
         {},
         "see Evaluation",
         [](R& r, const Yaml& y, Notes& n) { read_map(r, y, eval_keys(), "eval", n); },
         [](const R& r) { return show_map(r, eval_keys()); }},
        count("logging_steps", {"log_every"}, &R::log_every, 1, kMost, "steps between lines of metrics.jsonl"),
        choice<R, OnTrouble>("on_nan", {}, &R::on_nan, kOnNan,
                             "a loss or gradient that is not finite: stop the run, or skip the step; never applied"),
        choice<R, OnTrouble>("on_spike", {}, &R::on_spike, kOnSpike,
                             "a loss above spike_factor times its running mean: stop, skip the step, or ignore"),
        real("spike_factor", {}, &R::spike_factor, 1, 1e9, "see on_spike"),
        choice<R, Precision>("precision", {}, &R::precision, {{"fast", Precision::fast}, {"exact", Precision::exact}},
                             "fast: products of bf16 operands where the CPU has them; exact: fp32"),
        count("threads", {}, &R::threads, 0, 4096, "0: one per core; the result does not depend on it"),
        {"seed",
         {},
         "of the order of the data",
         [](R& r, const Yaml& y, Notes&) { r.seed = uint64_t(whole(y, "seed", 0, kMost)); },
         [](const R& r) { return scalar(std::to_string(r.seed)); }},
        choice<R, std::string>("dtype", {}, &R::dtype, {{"bf16", "bf16"}, {"f32", "f32"}},
                               "of the final model: bf16 or f32; default: as the student is stored"),
    };
    append(k, once(lift<Draft, R>(run, &Draft::run)));
    append(k, stage_defaults());
    k.push_back({"training_args",
                 {},
                 "DistillKit's place for many of these keys; see Training arguments",
                 [](Draft& d, const Yaml& y, Notes& n) { read_map(d, y, training_args_keys(), "training_args", n); },
                 nullptr});
    k.push_back({"stages",
                 {},
                 "list, see Stages; without it the keys of a stage given outside make one",
                 [](Draft& d, const Yaml& y, Notes&) {
                   KDA_CHECK(y.kind == Yaml::Kind::list && !y.items.empty(), y.where, ": stages must be a list, is ",
                             show(y));
                   d.stages = y.items;
                 },
                 [](const Draft& d) { return show_list(d.run.stages, stage_keys()); }});
    for (const auto& [name, why] : std::vector<std::pair<const char*, const char*>>{
             {"use_flash_attention", "there is one way to take attention"},
             {"trust_remote_code", "no code of a model folder is run"},
         })
      k.push_back(harmless<Draft>(name, why));
    k.push_back(refused<Draft>("model_kwargs", "the model follows from its folder"));
    k.push_back(
        refused<Draft>("force_hidden_state_projection", "hidden states are compared as they are, of one width"));
    k.push_back(refused<Draft>("functionary_packing", "pieces are packed as sequences of their own, which is safer"));
    k.push_back(refused<Draft>("resize_embeddings_to_multiple_of", "convert the student with the vocabulary you want"));
    return k;
  }();
  return keys;
}

}  // namespace kda::run_keys
