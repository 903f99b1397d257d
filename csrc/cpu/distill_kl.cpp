// distill_kl on the CPU: checks, threads, registration. The contract is in distill_kl.h.
#include "distill_kl.h"

#include <string>

#include "reuse.h"

namespace pyfast {
namespace {

// Gradients larger than this leave the cache before anybody reads them: stream them.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

std::tuple<Tensor, Tensor> distill_kl(const Tensor& student, const Tensor& teacher, const Tensor& row_scale,
                                      std::string divergence, double student_temperature, double teacher_temperature,
                                      bool with_grad) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2, "student, teacher: must have shape [rows, vocabulary]");
  STD_TORCH_CHECK(student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1),
                  "student, teacher: shapes must agree");
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(), "student, teacher: dtypes must agree");
  STD_TORCH_CHECK(
      row_scale.dim() == 1 && row_scale.size(0) == student.size(0) && row_scale.scalar_type() == ScalarType::Float,
      "row_scale: must be float32 with one value a row");
  STD_TORCH_CHECK(divergence == "forward_kl", "divergence: got '", divergence, "', accepted: forward_kl");
  const Dtype dtype = dtype_of(student, "student");
  const int64_t rows = student.size(0), vocab = student.size(1);
  Tensor value = torch::stable::new_empty(student, {rows}, ScalarType::Float);
  Tensor grad = reusable_empty(student, with_grad ? rows : 0, with_grad ? vocab : 0);
  if (rows == 0 || vocab == 0) {
    torch::stable::zero_(value);
    return {value, grad};
  }
  const Tensor s = rows_contiguous(student), t = rows_contiguous(teacher);
  const Tensor scale = torch::stable::contiguous(row_scale);
  DistillKlArgs args{};
  args.student = s.const_data_ptr();
  args.teacher = t.const_data_ptr();
  args.row_scale = scale.const_data_ptr<float>();
  args.rows = value.mutable_data_ptr<float>();
  args.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  args.student_stride = s.stride(0);
  args.teacher_stride = t.stride(0);
  args.grad_stride = vocab;
  args.vocab = vocab;
  args.student_temperature = student_temperature;
  args.teacher_temperature = teacher_temperature;
  args.stream_grad = with_grad && rows * vocab * static_cast<int64_t>(student.element_size()) > kStreamBytes;
  const DistillKlKernel kernel = distill_kl_table(active_isa()).forward_kl[static_cast<int>(dtype)];
  parallel_chunks(rows, 1 + 16384 / vocab, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {value, grad};
}

Tensor scale_rows(const Tensor& grad, const Tensor& scale) {
  STD_TORCH_CHECK(grad.dim() == 2 && scale.dim() == 1 && scale.size(0) == grad.size(0),
                  "grad, scale: must have shapes [rows, vocabulary] and [rows]");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "scale: must be float32");
  const Dtype dtype = dtype_of(grad, "grad");
  const int64_t rows = grad.size(0), vocab = grad.size(1);
  Tensor out = reusable_empty(grad, rows, vocab);
  if (rows == 0 || vocab == 0) return out;
  const Tensor g = rows_contiguous(grad);
  const ScaleRowsArgs args{g.const_data_ptr(),
                           scale.const_data_ptr<float>(),
                           out.mutable_data_ptr(),
                           g.stride(0),
                           scale.stride(0),
                           vocab,
                           vocab};
  const ScaleRowsKernel kernel = distill_kl_table(active_isa()).scale_rows[static_cast<int>(dtype)];
  parallel_chunks(rows, 1 + 65536 / vocab, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("distill_kl", TORCH_BOX(&pyfast::distill_kl));
  m.impl("scale_rows", TORCH_BOX(&pyfast::scale_rows));
}
