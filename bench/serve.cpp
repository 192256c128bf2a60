// Serves a packaged network without Python, from several threads at once, and times it:
//   serve libmtlkernels.so network.pt2 calls.pt outputs.pt THREADS SECONDS
// calls.pt is a tuple of calls, each a tuple of tensors, as torch.save writes it. Every call is made once alone; that
// is what outputs.pt holds. Then THREADS threads make all calls for SECONDS, each in another order, and compare bit by
// bit. Then each call is made alone again, for SECONDS. Prints JSON; the exit status is 1 where an output differed.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <thread>

namespace {

using Tensors = std::vector<at::Tensor>;
using Network = torch::inductor::AOTIModelPackageLoader;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Tensors tensors_of(const c10::IValue& tuple) {
  Tensors found;
  for (const auto& value : tuple.toTupleRef().elements()) found.push_back(value.toTensor());
  return found;
}

c10::IValue tuple_of(const Tensors& tensors) {
  return c10::ivalue::Tuple::create(std::vector<c10::IValue>(tensors.begin(), tensors.end()));
}

bool same(const Tensors& a, const Tensors& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](auto& x, auto& y) { return x.equal(y); });
}

// How many calls the threads made, and how many of these gave something else than `expected`.
std::pair<size_t, size_t> at_once(Network& network, const std::vector<Tensors>& calls,
                                  const std::vector<Tensors>& expected, size_t count, double seconds) {
  std::atomic<size_t> made = 0, different = 0, ready = 0;
  std::vector<std::thread> threads;
  for (size_t t = 0; t < count; ++t) {
    threads.emplace_back([&, t] {
      const c10::InferenceMode guard;  // is a thread's own
      ++ready;
      while (ready < count) std::this_thread::yield();
      const double end = now() + seconds;
      for (size_t i = t; i < t + calls.size() || now() < end; ++i) {
        const size_t at = i % calls.size();
        try {
          different += !same(network.run(calls[at]), expected[at]);
        } catch (const std::exception& error) {
          std::cerr << error.what() << '\n';
          ++different;
        }
        ++made;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  return {made, different};
}

// Seconds of each run of one call: five at least.
std::vector<double> times(Network& network, const Tensors& call, double seconds) {
  std::vector<double> found;
  for (const double warm = now() + seconds / 4; now() < warm;) network.run(call);
  for (const double end = now() + seconds; found.size() < 5 || now() < end;) {
    const double begin = now();
    network.run(call);
    found.push_back(now() - begin);
  }
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) {
    std::cerr << "serve libmtlkernels.so network.pt2 calls.pt outputs.pt THREADS SECONDS\n";
    return 2;
  }
  // Before the package, which looks its operators up when it is loaded.
  if (!dlopen(arguments[1], RTLD_NOW)) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  const size_t threads = std::stoul(arguments[5]);
  const double seconds = std::stod(arguments[6]);
  // As many runners as threads: calls beyond these would wait for one another.
  Network network(arguments[2], "model", false, std::max<size_t>(threads, 1));
  std::ifstream file(arguments[3], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue loaded = torch::jit::pickle_load(bytes);
  const c10::InferenceMode guard;
  std::vector<Tensors> calls, expected;
  std::vector<c10::IValue> results;
  for (const auto& call : loaded.toTupleRef().elements()) {
    calls.push_back(tensors_of(call));
    expected.push_back(network.run(calls.back()));
    results.push_back(tuple_of(expected.back()));
  }
  const auto outputs = torch::jit::pickle_save(c10::ivalue::Tuple::create(results));
  std::ofstream(arguments[4], std::ios::binary).write(outputs.data(), outputs.size());
  const auto [made, different] = at_once(network, calls, expected, threads, seconds);
  std::cout << "{\"threads\": " << threads << ", \"calls\": " << made << ", \"different\": " << different
            << ", \"times\": [";
  for (size_t i = 0; i < calls.size(); ++i) {
    std::cout << (i ? ", [" : "[");
    const auto found = times(network, calls[i], seconds);
    for (size_t k = 0; k < found.size(); ++k) std::cout << (k ? ", " : "") << found[k];
    std::cout << ']';
  }
  std::cout << "]}\n";
  return different ? 1 : 0;
}
