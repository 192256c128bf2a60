// Every operator's schema, on one page. Kernels are registered beside their code, in cpu/<op>.cpp and cuda/<op>.cu.
#include <string>

#include "common/boxing.h"

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
  // The first output alone, for eager calls without a gradient: a second one costs them a microsecond.
  m.def(
      "expert_linear_only(Tensor x, Tensor weight, Tensor? bias, int[]? experts_per_unit, str activation, bool save)"
      " -> Tensor");
  // needs: bit 1 dx, 2 dweight, 4 dbias; what is not needed comes back empty. saved: y, or z where forward saved it.
  m.def(
      "expert_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor saved, int[]? experts_per_unit,"
      " str activation, int needs) -> (Tensor, Tensor, Tensor)");
  // The same of a layer whose x is another's output, and wanted no more: x becomes the gradient of that layer's sums,
  // dx act'(x). On a CPU. grad: of this layer's sums. needs: bit 2 dweight, 4 dbias.
  m.def(
      "expert_linear_backward_into(Tensor grad, Tensor(a!) x, Tensor weight, int[]? experts_per_unit, str through,"
      " int needs) -> (Tensor, Tensor)");
  // O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] H[b,e,:]. Second output: the logits' logsumexp [B,T].
  define_forward(m, "mix",
                 "(Tensor experts, Tensor? logits, Tensor? static, Tensor? mask, Tensor? columns, int[]? native)"
                 " -> (Tensor, Tensor)");
  // As above: the first output alone.
  m.def(
      "mix_only(Tensor experts, Tensor? logits, Tensor? static, Tensor? mask, Tensor? columns, int[]? native)"
      " -> Tensor");
  // needs: bit 1 dexperts, 2 dlogits, 4 dstatic.
  m.def(
      "mix_backward(Tensor grad, Tensor? grad_lse, Tensor experts, Tensor? logits, Tensor? static, Tensor? mask,"
      " Tensor? columns, int[]? native, Tensor lse, int needs) -> (Tensor, Tensor, Tensor)");
  // The same of experts that are wanted no more, and become the gradient of their sums. On a CPU. needs: bit 2 dlogits,
  // 4 dstatic.
  m.def(
      "mix_backward_into(Tensor grad, Tensor(a!) experts, Tensor? logits, Tensor? static, Tensor? columns,"
      " int[]? native, str through, int needs) -> (Tensor, Tensor)");
  // Mean over rows of the click's cross entropy and, times the weight, click-and-conversion's. All [B]; second and
  // third output: the loss's derivatives by the logits, in the type of sums.
  define_forward(m, "esmm_loss",
                 "(Tensor ctr_logit, Tensor cvr_logit, Tensor click, Tensor conversion, float ctcvr_weight)"
                 " -> (Tensor, Tensor, Tensor)");
  m.def("esmm_loss_backward(Tensor grad, Tensor dctr, Tensor dcvr) -> (Tensor, Tensor)");
  // Each task's mean cross entropy [T] of [B,T], weighted by the mask. Second output: dlogits [B,T], in the type of
  // sums.
  define_forward(m, "masked_bce", "(Tensor logits, Tensor labels, Tensor? mask) -> (Tensor, Tensor)");
  m.def("masked_bce_backward(Tensor grad, Tensor dlogits) -> Tensor");
  // y = (w w_p) (x - mean_p) / sqrt(var_p + eps) + b + b_p. Further outputs: the statistics used [P,D], and the rows of
  // each domain that they come from [P]: none outside training.
  define_forward(m, "partitioned_norm",
                 "(Tensor x, Tensor domain, Tensor weight, Tensor bias, Tensor domain_weight, Tensor domain_bias,"
                 " Tensor running_mean, Tensor running_var, bool training, float eps)"
                 " -> (Tensor, Tensor, Tensor, Tensor)");
  // needs: bit 1 dx, 2 dweight, 4 dbias, 8 ddomain_weight, 16 ddomain_bias.
  m.def(
      "partitioned_norm_backward(Tensor grad, Tensor x, Tensor domain, Tensor weight, Tensor domain_weight,"
      " Tensor mean, Tensor var, Tensor count, bool training, float eps, int needs)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // out_b = act((W * W_p) x_b + c + c_p), p = domain_b. Second output: z, as for expert_linear.
  define_forward(m, "star_linear",
                 "(Tensor x, Tensor domain, Tensor weight, Tensor domain_weight, Tensor? bias, Tensor? domain_bias,"
                 " str activation, bool save) -> (Tensor, Tensor)");
  // needs: bit 1 dx, 2 dweight, 4 ddomain_weight, 8 dbias, 16 ddomain_bias. saved: as for expert_linear.
  m.def(
      "star_linear_backward(Tensor grad, Tensor x, Tensor domain, Tensor weight, Tensor domain_weight, Tensor saved,"
      " str activation, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // z = min(1, max(0, s (zeta - gamma) + gamma)); second output: s, in the type of sums.
  define_forward(m, "hard_concrete",
                 "(Tensor log_alpha, Tensor? noise, float beta, float gamma, float zeta) -> (Tensor, Tensor)");
  m.def("hard_concrete_backward(Tensor grad, Tensor s, float beta, float gamma, float zeta, bool sampled) -> Tensor");
  // Expected number of open connections, a scalar, and its gradient.
  define_forward(m, "hard_concrete_l0", "(Tensor log_alpha, float beta, float gamma, float zeta) -> (Tensor, Tensor)");
  m.def("hard_concrete_l0_backward(Tensor grad, Tensor slope) -> Tensor");
  // Y[b,i,:] = act(sum_j gate[i,j] W_ij x[b,j,:] + c_i). Second output: z, as expert_linear's.
  define_forward(m, "snr_linear",
                 "(Tensor x, Tensor weight, Tensor gate, Tensor? bias, str activation, bool skip_closed, bool save)"
                 " -> (Tensor, Tensor)");
  // needs: bit 1 dx, 2 dweight, 4 dgate, 8 dbias. skip_closed: a gate at 0 has no gradient, nor has its weight.
  m.def(
      "snr_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor gate, Tensor saved, str activation,"
      " bool skip_closed, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
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
  // The same where time counts more than memory: on a CPU, no GPU has it. Third output, for backward: the experts'
  // outputs [B,E,D], before the activation for gelu and silu.
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
  // The instruction set of the CPU kernels; a name that is not empty chooses one, for all threads.
  m.def("cpu_isa(str name) -> str");
}
