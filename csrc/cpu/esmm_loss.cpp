// esmm_loss on a CPU: loss and both gradients in one pass over the rows.
#include "losses.h"

namespace mtl {

namespace {

std::tuple<Tensor, Tensor, Tensor> esmm_loss(const Tensor& ctr_logit, const Tensor& cvr_logit, const Tensor& click,
                                             const Tensor& conversion, double ctcvr_weight) {
  STD_TORCH_CHECK(ctr_logit.dim() == 1, "ctr_logit must be [B]");
  const int64_t batch = ctr_logit.size(0);
  for (const Tensor* t : {&cvr_logit, &click, &conversion})
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == batch, "cvr_logit, click and conversion must be [B] as ctr_logit");
  STD_TORCH_CHECK(cvr_logit.scalar_type() == ctr_logit.scalar_type(), "cvr_logit must have ctr_logit's dtype");
  const LossKernels& kernel = loss_kernels_of(ctr_logit, "ctr_logit");
  const Tensor a = dense(ctr_logit), c = dense(cvr_logit), y = dense(click), z = dense(conversion);
  const ScalarType type = loss_type(ctr_logit);
  Tensor loss = allocate({}, type), da = allocate({batch}, type), dc = allocate({batch}, type);
  EsmmArgs args{};
  args.ctr = a.const_data_ptr(), args.cvr = c.const_data_ptr();
  args.click = labels_of(y, "click"), args.conversion = labels_of(z, "conversion");
  args.weight = ctcvr_weight, args.scale = 1.0 / double(std::max<int64_t>(batch, 1));
  args.dctr = da.mutable_data_ptr(), args.dcvr = dc.mutable_data_ptr();

  const int64_t size = kLossNumbers / 4, blocks = (batch + size - 1) / size;  // a row costs as much as four numbers
  std::vector<double> sums(blocks);
  std::vector<int64_t> bad(blocks, -1);
  run_tasks(blocks, 3 * kLossWork * double(batch),
            [&](int64_t i) { sums[i] = kernel.esmm(args, i * size, std::min(batch, (i + 1) * size), &bad[i]); });
  if (const int64_t row = first_bad(bad); row >= 0) {
    const double click_there = label_at(y, row), conversion_there = label_at(z, row);
    STD_TORCH_CHECK(click_there >= 0 && click_there <= 1, "click must lie in [0, 1]; got ", click_there, " in row ",
                    row);
    STD_TORCH_CHECK(conversion_there >= 0 && conversion_there <= 1, "conversion must lie in [0, 1]; got ",
                    conversion_there, " in row ", row);
    STD_TORCH_CHECK(false, "conversion must be 0 where click is 0; got conversion ", conversion_there,
                    " without a click in row ", row);
  }
  double total = 0;
  for (double sum : sums) total += sum;
  total *= args.scale;
  if (type == ScalarType::Double)
    *mutable_data<double>(loss) = total;
  else
    *mutable_data<float>(loss) = float(total);
  return {loss, da, dc};
}

std::tuple<Tensor, Tensor> esmm_loss_backward(const Tensor& grad, const Tensor& dctr, const Tensor& dcvr) {
  const ScalarType type = dctr.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "dctr must be float32 or float64");
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == type && dcvr.scalar_type() == type,
                  "grad must be a single number, and dcvr as dctr, in dctr's dtype");
  const Tensor da = dense(dctr), dc = dense(dcvr);
  Tensor ga = allocate_like(da), gc = allocate_like(dc);
  const Tensor pattern = allocate({kLossPeriod}, type);
  with_type(type, "grad", [&](auto s) {
    using C = decltype(s);
    std::fill_n(mutable_data<C>(pattern), kLossPeriod, *data<C>(grad));
  });
  scale_numbers(pattern.const_data_ptr(), kLossPeriod, da, ga);
  scale_numbers(pattern.const_data_ptr(), kLossPeriod, dc, gc);
  return {ga, gc};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("esmm_loss", TORCH_BOX(&esmm_loss));
  m.impl("esmm_loss_eager", TORCH_BOX(&esmm_loss));
  m.impl("esmm_loss_backward", TORCH_BOX(&esmm_loss_backward));
}

}  // namespace mtl
