// The folder of a run on disk: checkpoints that are there or not, never half; metrics that end with a whole line.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <map>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/safetensors.h"
#include "train/train_state.h"

namespace kda {

namespace {
namespace fs = std::filesystem;
constexpr const char* kCheckpoint = "checkpoint-";
constexpr const char* kDraft = ".draft-";  // what is being written; a killed run leaves such

void sync_folder(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);  // some file systems cannot; the files themselves were synced
  ::close(fd);
}

void write_whole(const fs::path& path, std::string_view text) {
  AtomicFile f(path);
  f.write(text);
  f.commit();
}

void rename_folder(const fs::path& from, const fs::path& to) {
  KDA_CHECK(::rename(from.c_str(), to.c_str()) == 0, to.string(), ": cannot rename ", from.string(), ": ",
            std::strerror(errno));
  sync_folder(to.parent_path());
}
}  // namespace

// ---- LineLog

LineLog::LineLog(const fs::path& path) : path_(path) {
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  KDA_CHECK(fd_ >= 0, path.string(), ": cannot open for writing: ", std::strerror(errno));
  struct stat st;
  KDA_CHECK(::fstat(fd_, &st) == 0, path.string(), ": cannot stat: ", std::strerror(errno));
  bytes_ = st.st_size;
}

LineLog::~LineLog() {
  if (fd_ >= 0) ::close(fd_);
}

bool LineLog::append(std::string_view line) {
  waiting_.append(line).append("\n");
  size_t done = 0;
  while (done < waiting_.size()) {
    const ssize_t n = ::pwrite(fd_, waiting_.data() + done, waiting_.size() - done, bytes_ + int64_t(done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      // Half a line is worse than none; a failure to cut shows when the next line is written over it.
      [[maybe_unused]] const int cut = ::ftruncate(fd_, bytes_);
      return false;
    }
    done += size_t(n);
  }
  bytes_ += int64_t(done);
  waiting_.clear();
  return true;
}

void LineLog::cut(int64_t bytes) {
  KDA_CHECK(bytes <= bytes_, path_.string(), ": has ", bytes_, " bytes, the checkpoint was made when it had ", bytes);
  KDA_CHECK(::ftruncate(fd_, bytes) == 0, path_.string(), ": cannot cut: ", std::strerror(errno));
  bytes_ = bytes;
}

// ---- RunFolder

RunFolder::RunFolder(const fs::path& path, bool resume) : path_(path) {
  std::error_code error;
  fs::create_directories(path_, error);
  KDA_CHECK(is_folder(path_), path_.string(), ": cannot make this folder",
            error ? ": " + error.message() : std::string());
  lock_ = ::open((path_ / ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  KDA_CHECK(lock_ >= 0, path_.string(), ": cannot write there: ", std::strerror(errno));
  try {
    KDA_CHECK(::flock(lock_, LOCK_EX | LOCK_NB) == 0, path_.string(), ": another run is writing there now");
    KDA_CHECK(!path_exists(final_model()), path_.string(),
              ": holds a finished run, which is left as it is; give another output_path");
    const bool begun = last_checkpoint() || path_exists(path_ / "metrics.jsonl");
    KDA_CHECK(resume || !begun, path_.string(),
              ": holds a run that was begun; go on with --resume, or give another output_path");
    for (const auto& e : fs::directory_iterator(path_))
      for (const char* half : {kDraft, "final.tmp-"})  // the second is write_model_folder's
        if (e.path().filename().string().rfind(half, 0) == 0) fs::remove_all(e.path(), error);
  } catch (...) {
    ::close(lock_);
    throw;
  }
}

RunFolder::~RunFolder() { ::close(lock_); }

std::vector<std::pair<int64_t, fs::path>> RunFolder::checkpoints() const {
  std::vector<std::pair<int64_t, fs::path>> out;
  for (const auto& e : fs::directory_iterator(path_)) {
    const std::string name = e.path().filename().string();
    if (name.rfind(kCheckpoint, 0) != 0) continue;
    int64_t step = 0;
    const char *from = name.data() + std::strlen(kCheckpoint), *end = name.data() + name.size();
    const auto [stop, error_code] = std::from_chars(from, end, step);
    if (error_code == std::errc() && stop == end && stop != from) out.emplace_back(step, e.path());
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::optional<fs::path> RunFolder::last_checkpoint() const {
  const auto all = checkpoints();
  return all.empty() ? std::nullopt : std::optional(all.back().second);
}

void RunFolder::save(const TrainState& state, Parameters& parameters, const std::string& run_yaml, int64_t keep) {
  const std::string name = cat(kCheckpoint, state.step);
  const fs::path draft = path_ / (kDraft + name);
  std::error_code ignored;
  fs::remove_all(draft, ignored);
  try {
    fs::create_directory(draft);
    std::map<std::string, ConstView> masters, moments;
    for (const Parameter& p : parameters.all()) {
      if (!p.master) continue;
      masters[p.name] = p.master;
      if (!p.trainable) continue;
      moments[p.name + ".m"] = p.m;
      moments[p.name + ".v"] = p.v;
    }
    save_safetensors(draft / "masters.safetensors", masters);
    save_safetensors(draft / "moments.safetensors", moments);
    write_whole(draft / "run.yaml", run_yaml);
    write_whole(draft / "state.json", write_state(state));
    sync_folder(draft);
    if (path_exists(path_ / name)) fs::remove_all(path_ / name);
    rename_folder(draft, path_ / name);
  } catch (const fs::filesystem_error& e) {
    fs::remove_all(draft, ignored);
    throw Error(cat((path_ / name).string(), ": cannot be written: ", e.code().message()));
  } catch (...) {
    fs::remove_all(draft, ignored);
    throw;
  }
  auto all = checkpoints();
  for (size_t i = 0; i + size_t(keep) < all.size(); ++i) {
    // Renamed first: a kill while files are being removed must not leave half a checkpoint under its name.
    const fs::path old = path_ / (kDraft + all[i].second.filename().string());
    fs::rename(all[i].second, old, ignored);
    fs::remove_all(old, ignored);
  }
}

TrainState RunFolder::load_state() const {
  const auto last = last_checkpoint();
  KDA_CHECK(last, path_.string(), ": no checkpoint there");
  return read_state(read_file(*last / "state.json", size_t(1) << 24), (*last / "state.json").string());
}

std::string RunFolder::load_run_file() const { return read_file(*last_checkpoint() / "run.yaml", size_t(1) << 24); }

void RunFolder::load_parameters(Context& ctx, Parameters& parameters) const {
  const auto last = last_checkpoint();
  KDA_CHECK(last, path_.string(), ": no checkpoint there");
  const SafetensorsFile masters(*last / "masters.safetensors"), moments(*last / "moments.safetensors");
  const auto fill = [&](const SafetensorsFile& f, const std::string& name, const Tensor& to) {
    const Tensor from = f.tensor(name, to.shape());
    KDA_CHECK(from.dtype() == to.dtype(), f.path().string(), ": tensor '", name, "' is ", name_of(from.dtype()),
              ", needed ", name_of(to.dtype()));
    ctx.backend->copy(ctx, to.v.data, from.v.data, to.v.bytes());
  };
  size_t filled = 0, filled_moments = 0;
  for (const Parameter& p : parameters.all()) {
    if (!p.master) continue;
    fill(masters, p.name, p.master);
    ++filled;
    if (!p.trainable) continue;
    fill(moments, p.name + ".m", p.m);
    fill(moments, p.name + ".v", p.v);
    filled_moments += 2;
  }
  KDA_CHECK(filled == masters.tensors().size() && filled_moments == moments.tensors().size(), last->string(),
            ": holds other tensors than the run file trains");
}

fs::path RunFolder::best_draft() const {
  const fs::path draft = path_ / (std::string(kDraft) + "best");
  std::error_code ignored;
  fs::remove_all(draft, ignored);
  return draft;
}

void RunFolder::keep_best() const {
  const fs::path draft = path_ / (std::string(kDraft) + "best");
  if (!path_exists(best_model())) return rename_folder(draft, best_model());
  constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE of <linux/fs.h>
  std::error_code ignored;
  if (::syscall(SYS_renameat2, AT_FDCWD, draft.c_str(), AT_FDCWD, best_model().c_str(), kExchange) != 0) {
    const fs::path old = path_ / (std::string(kDraft) + "old-best");
    rename_folder(best_model(), old);
    rename_folder(draft, best_model());
    fs::remove_all(old, ignored);
    return;
  }
  sync_folder(path_);
  fs::remove_all(draft, ignored);
}

}  // namespace kda
