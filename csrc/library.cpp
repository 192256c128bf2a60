// Every operator's schema, on one page. Kernels are registered beside their code, in cpu/<op>.cpp and cuda/<op>.cu.
#include <torch/csrc/stable/library.h>

#include <string>

// A forward operator and its twin `<name>_eager`: the same kernel, on which Python registers no autograd formula.
static void define_forward(torch::stable::detail::StableLibrary& m, const std::string& name, const std::string& rest) {
  m.def((name + rest).c_str());
  m.def((name + "_eager" + rest).c_str());
}

STABLE_TORCH_LIBRARY(mtlkernels, m) {
  // Y[b,e,:] = act(W_e x[b,unit(e),:] + c_e). Second output: z, the value before the activation, if `save` asks for it.
  define_forward(m, "expert_linear",
                 "(Tensor x, Tensor weight, Tensor? bias, int[]? experts_per_unit, str activation, bool save)"
                 " -> (Tensor, Tensor)");
  // needs: bit 1 dx, 2 dweight, 4 dbias; what is not needed comes back empty. saved: y, or z where forward saved it.
  m.def(
      "expert_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor saved, int[]? experts_per_unit,"
      " str activation, int needs) -> (Tensor, Tensor, Tensor)");
  // O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] H[b,e,:]. Second output: the logits' logsumexp [B,T].
  define_forward(m, "mix",
                 "(Tensor experts, Tensor? logits, Tensor? static, Tensor? mask, Tensor? columns, int[]? native)"
                 " -> (Tensor, Tensor)");
  // needs: bit 1 dexperts, 2 dlogits, 4 dstatic.
  m.def(
      "mix_backward(Tensor grad, Tensor? grad_lse, Tensor experts, Tensor? logits, Tensor? static, Tensor? mask,"
      " Tensor? columns, int[]? native, Tensor lse, int needs) -> (Tensor, Tensor, Tensor)");
  // O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] act(W_e x[b,unit(e),:] + c_e). Second output: as mix's.
  define_forward(
      m, "expert_mix",
      "(Tensor x, Tensor weight, Tensor? bias, Tensor? logits, Tensor? static, Tensor? mask, Tensor? columns,"
      " int[]? experts_per_unit, str activation) -> (Tensor, Tensor)");
  // Backward computes the experts' outputs again. needs: bit 1 dx, 2 dweight, 4 dbias, 8 dlogits, 16 dstatic.
  m.def(
      "expert_mix_backward(Tensor grad, Tensor? grad_lse, Tensor x, Tensor weight, Tensor? bias, Tensor? logits,"
      " Tensor? static, Tensor? mask, Tensor? columns, int[]? experts_per_unit, str activation, Tensor lse, int needs)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same where time counts more than memory. Third output, for backward: the experts' outputs [B,E,D], before the
  // activation for gelu and silu.
  define_forward(
      m, "expert_mix_saving",
      "(Tensor x, Tensor weight, Tensor? bias, Tensor? logits, Tensor? static, Tensor? mask, Tensor? columns,"
      " int[]? experts_per_unit, str activation) -> (Tensor, Tensor, Tensor)");
  m.def(
      "expert_mix_saving_backward(Tensor grad, Tensor? grad_lse, Tensor x, Tensor weight, Tensor? bias, Tensor? logits,"
      " Tensor? static, Tensor? mask, Tensor? columns, int[]? experts_per_unit, str activation, Tensor saved, int "
      "needs)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Gives the CPU tensors' freed blocks, kept for reuse, back to the system; returns their bytes.
  m.def("empty_cache() -> int");
}
