#include "train/stored_format.h"

namespace kda::stored {

std::shared_ptr<const StoredLogprobs> open_parquet(const std::filesystem::path& path,
                                                   const std::optional<LogprobCodecConfig>&) {
  throw Error(cat(path.string(),
                  ": Parquet is read by builds that found Apache Arrow: install libarrow and libparquet ",
                  "with their headers and configure again, or capture the teacher here: kda capture"));
}

}  // namespace kda::stored
