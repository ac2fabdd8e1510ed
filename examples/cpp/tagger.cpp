// Tags the characters of a line of Python with the model that export_tagger.py compiled. Contains no Python.
//
//   tagger <libseqkernels_ops.so> <tagger.pt2> "for i in range(10): x = 'a'  # done"
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: tagger <libseqkernels_ops.so> <tagger.pt2> <text>\n";
    return 2;
  }
  // Loading the library registers torch.ops.seqkernels.
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << "tagger: " << dlerror() << "\n";
    return 1;
  }
  const char* const tags[] = {"space", "name", "keyword", "number", "string", "operator", "comment"};
  const std::string text = argv[3];
  try {
    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    auto characters = torch::empty({static_cast<int64_t>(text.size()), 1}, torch::kInt64);
    for (size_t i = 0; i < text.size(); ++i) {
      const auto character = static_cast<unsigned char>(text[i]);
      characters[static_cast<int64_t>(i)][0] = character < 128 ? character : 0;
    }
    const auto best = model.run({characters})[0].argmax(-1).flatten();
    for (int64_t i = 0; i < best.numel(); ++i) std::cout << (i > 0 ? " " : "") << tags[best[i].item<int64_t>()];
    std::cout << "\n";
  } catch (const std::exception& error) {
    std::cerr << "tagger: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
