// Runs a packaged network without Python: run_package libmtlkernels.so network.pt2 inputs.pt outputs.pt
// Inputs and outputs are tuples of tensors, as torch.save writes and torch.load reads them.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int count, char** arguments) {
  if (count != 5) {
    std::cerr << "run_package libmtlkernels.so network.pt2 inputs.pt outputs.pt\n";
    return 2;
  }
  // Before the package, which looks its operators up when it is loaded. They stay as long as the process.
  if (!dlopen(arguments[1], RTLD_NOW)) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader network(arguments[2]);
  std::ifstream file(arguments[3], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<at::Tensor> inputs;
  const c10::IValue loaded = torch::jit::pickle_load(bytes);
  for (const auto& value : loaded.toTupleRef().elements()) inputs.push_back(value.toTensor());
  c10::InferenceMode guard;
  const auto found = network.run(inputs);
  const auto outputs =
      torch::jit::pickle_save(c10::ivalue::Tuple::create(std::vector<c10::IValue>(found.begin(), found.end())));
  std::ofstream(arguments[4], std::ios::binary).write(outputs.data(), outputs.size());
}
