// Generates text with libkda:  generate MODEL_FOLDER PROMPT
#include <iostream>

#include "runtime/generate.h"

int main(int argc, char** argv) try {
  if (argc != 3) throw kda::Error("usage: generate MODEL_FOLDER PROMPT");
  kda::Engine engine(argv[1]);
  if (!engine.tokenizer()) throw kda::Error("this model has no tokenizer.json");

  kda::GenerationRequest request;
  request.prompt = engine.tokenizer()->encode(argv[2], true);
  request.params.max_new_tokens = 32;

  kda::GenerationCallbacks callbacks;
  callbacks.on_text = [](size_t, std::string_view piece) { std::cout << piece << std::flush; };
  kda::generate(engine, {request}, callbacks);
  std::cout << '\n';
} catch (const std::exception& e) {
  std::cerr << e.what() << '\n';
  return 1;
}
