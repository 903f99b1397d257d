// Module pyfast._host: the CPU kernels for NumPy arrays, without torch. Every variant is callable by name, whatever
// this process would choose: for kernel research, parity tests and microbenchmarks. Single-threaded.
//
// Elements: float32 and float16 arrays are taken as they are; uint16 arrays hold bfloat16 bits.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/bitmap_convert.h"
#include "cpu/bitmap_linear.h"
#include "cpu/distill_kl.h"
#include "cpu/isa.h"
#include "cpu/nm_mask.h"
#include "cpu/sparse24_linear.h"
#include "cpu/topk_distill.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

struct Variant {
  const char* name;
  pyfast::Isa needs;
};

constexpr Variant kVariants[] = {
    {"serial", pyfast::Isa::serial},        {"avx2", pyfast::Isa::avx2},           {"avx512", pyfast::Isa::avx512},
    {"avx512_lookup", pyfast::Isa::avx512}, {"avx512_vbmi2", pyfast::Isa::avx512}, {"avx512_bf16", pyfast::Isa::avx512},
};

bool runs(const Variant& v) {
  const std::string name = v.name;
  if (name == "avx512_bf16") return pyfast::has_avx512_bf16();
  return name.rfind("avx512_", 0) == 0 ? pyfast::has_vbmi2() : pyfast::isa_supported(v.needs);
}

pyfast::Isa checked(const std::string& variant) {
  std::string accepted;
  for (const Variant& v : kVariants) {
    if (!runs(v)) continue;
    if (variant == v.name) return v.needs;
    accepted += accepted.empty() ? v.name : std::string(", ") + v.name;
  }
  throw py::value_error("variant: got '" + variant + "', accepted here: " + accepted);
}

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Variant& v : kVariants)
    if (runs(v)) names.emplace_back(v.name);
  return names;
}

pyfast::Dtype dtype_of(const py::array& a, const char* name) {
  if (a.dtype().is(py::dtype::of<float>())) return pyfast::Dtype::f32;
  if (a.dtype().is(py::dtype::of<uint16_t>())) return pyfast::Dtype::bf16;
  if (a.dtype().kind() == 'f' && a.itemsize() == 2) return pyfast::Dtype::f16;
  throw py::type_error(std::string(name) + ": accepted: float32, float16, or uint16 holding bfloat16 bits");
}

// Arguments that are not elements: taken as they are, never converted.
template <class T>
Array<T> exactly(const py::array& a, const char* accepted) {
  if (!a.dtype().is(py::dtype::of<T>())) throw py::type_error(accepted);
  return Array<T>::ensure(a);
}

py::array contiguous(const py::array& a) { return py::array::ensure(a, py::array::c_style); }

void require(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

py::tuple distill_kl(const py::array& student, const py::array& teacher, double temperature,
                     std::optional<double> teacher_temperature, const std::string& variant, bool with_grad,
                     const std::string& divergence, double mix) {
  const auto name = std::find(std::begin(pyfast::kDivergenceNames), std::end(pyfast::kDivergenceNames), divergence);
  require(name != std::end(pyfast::kDivergenceNames), "divergence: accepted: those of pyfast.distillation_loss");
  require(mix > 0 && mix < 1, "mix: accepted: above 0 and below 1");
  const pyfast::DistillKlTable& table = pyfast::distill_kl_table(checked(variant));
  const py::array s = contiguous(student), t = contiguous(teacher);
  require(s.ndim() == 2 && t.ndim() == 2 && s.shape(0) == t.shape(0) && s.shape(1) == t.shape(1),
          "student, teacher: accepted: two matrices of one shape");
  const pyfast::Dtype dtype = dtype_of(s, "student");
  require(dtype_of(t, "teacher") == dtype, "teacher: accepted: the student's dtype");
  require(temperature > 0 && teacher_temperature.value_or(temperature) > 0, "temperature: accepted: above 0");
  const py::ssize_t rows = s.shape(0), vocab = s.shape(1);
  py::array_t<float> value(rows);
  py::array grad(s.dtype(), std::vector<py::ssize_t>{with_grad ? rows : 0, with_grad ? vocab : 0});
  const std::vector<float> ones(static_cast<size_t>(rows), 1.0f);
  pyfast::DistillKlArgs args{};
  args.student = s.data();
  args.teacher = t.data();
  args.row_scale = ones.data();
  args.rows = value.mutable_data();
  args.grad = with_grad ? grad.mutable_data() : nullptr;
  args.student_stride = args.teacher_stride = args.grad_stride = args.vocab = vocab;
  args.student_temperature = temperature;
  args.teacher_temperature = teacher_temperature.value_or(temperature);
  args.mix = mix;
  std::vector<float> scratch(static_cast<size_t>(pyfast::row_scratch(vocab)));
  table.rows[name - std::begin(pyfast::kDivergenceNames)][static_cast<int>(dtype)](args, scratch.data(), 0, rows);
  return py::make_tuple(value, grad);
}

py::tuple topk_distill(const py::array& student, const py::array& ids, const py::array& entries,
                       const std::string& tail, double temperature, const std::string& variant, bool with_grad) {
  const pyfast::TopkDistillTable& table = pyfast::topk_distill_table(checked(variant));
  const py::array s = contiguous(student);
  const auto words = exactly<int64_t>(ids, "ids: accepted: int64");
  const auto teacher = exactly<double>(entries, "entries: accepted: float64");
  require(s.ndim() == 2, "student: accepted: a matrix");
  require(words.ndim() == 2 && teacher.ndim() == 2 && words.shape(0) == s.shape(0) && teacher.shape(0) == s.shape(0) &&
              words.shape(1) == teacher.shape(1),
          "ids, entries: accepted: two matrices [rows, k] of one shape");
  require(temperature > 0, "temperature: accepted: above 0");
  int mode = 0;
  while (mode < pyfast::kTopkTailCount && tail != pyfast::kTopkTailNames[mode]) ++mode;
  require(mode < pyfast::kTopkTailCount, "tail: accepted: bucket, ignore, renormalise, sampled");
  const py::ssize_t rows = s.shape(0), vocab = s.shape(1), k = words.shape(1);
  py::array_t<float> value(rows);
  py::array grad(s.dtype(), std::vector<py::ssize_t>{with_grad ? rows : 0, with_grad ? vocab : 0});
  const std::vector<float> ones(static_cast<size_t>(rows), 1.0f);
  std::vector<pyfast::TopkEntry> scratch(static_cast<size_t>(2 * k));
  pyfast::TopkDistillArgs args{};
  args.student = s.data();
  args.ids = words.data();
  args.entries = teacher.data();
  args.row_scale = ones.data();
  args.rows = value.mutable_data();
  args.grad = with_grad ? grad.mutable_data() : nullptr;
  args.student_stride = args.grad_stride = args.vocab = vocab;
  args.ids_stride = args.entries_stride = args.k = k;
  args.tail = static_cast<pyfast::TopkTail>(mode);
  args.temperature = temperature;
  table.rows[static_cast<int>(dtype_of(s, "student"))](args, 0, rows, scratch.data());
  return py::make_tuple(value, grad);
}

pyfast::Epilogue epilogue(py::array& y, py::ssize_t n, pyfast::Dtype dtype) {
  pyfast::Epilogue e{};
  e.y = y.mutable_data();
  e.y_stride = e.n = n;
  e.dtype = dtype;
  return e;
}

py::array sparse24_linear(const py::array& activations, const py::array& values, const py::array& words,
                          const std::string& variant) {
  const auto x = exactly<float>(activations, "x: accepted: float32");
  const auto metadata = exactly<uint16_t>(words, "metadata: accepted: uint16");
  const pyfast::Sparse24LinearTable& table = pyfast::sparse24_linear_table(checked(variant));
  const py::array v = contiguous(values);
  require(x.ndim() == 2 && v.ndim() == 2 && metadata.ndim() == 2, "x, values, metadata: accepted: matrices");
  const py::ssize_t tokens = x.shape(0), n = v.shape(0), k = 2 * v.shape(1);
  require(k % 32 == 0 && x.shape(1) == k && metadata.shape(0) == n && metadata.shape(1) == k / 16,
          "x, values, metadata: accepted: [tokens, k], [n, k/2], [n, k/16] with k a multiple of 32");
  const pyfast::Dtype dtype = dtype_of(v, "values");
  py::array y(v.dtype(), std::vector<py::ssize_t>{tokens, n});
  pyfast::Sparse24LinearArgs args{};
  args.x = x.data();
  args.values = v.data();
  args.metadata = metadata.data();
  args.tokens = tokens;
  args.k = args.x_stride = k;
  args.out = epilogue(y, n, dtype);
  table.linear[static_cast<int>(dtype)](args, 0, n);
  return y;
}

const pyfast::BitmapLinearTable& bitmap_table(const std::string& variant) {
  const pyfast::Isa isa = checked(variant);
#if defined(__x86_64__)
  if (variant == "avx512") return pyfast::kBitmapLinearAvx512;
  if (variant == "avx512_lookup") return pyfast::kBitmapLinearAvx512Lookup;
  if (variant == "avx512_vbmi2") return pyfast::kBitmapLinearAvx512Vbmi2;
  if (variant == "avx512_bf16") return pyfast::bitmap_linear_table(isa, 1.0);
#endif
  return pyfast::bitmap_linear_table(isa, 1.0);
}

py::array bitmap_linear(const py::array& activations, const py::array& values, const py::array& words,
                        const py::array& starts, py::ssize_t n, const std::string& variant) {
  const auto x = exactly<float>(activations, "x: accepted: float32");
  const auto bitmaps = exactly<uint64_t>(words, "bitmaps: accepted: uint64");
  const auto offsets = exactly<int64_t>(starts, "offsets: accepted: int64");
  require(n >= 0, "n: accepted: 0 or more");
  const pyfast::BitmapLinearTable& table = bitmap_table(variant);
  const py::array v = contiguous(values);
  require(x.ndim() == 2 && x.shape(1) % pyfast::kTileColumns == 0, "x: accepted: [tokens, k], k a multiple of 64");
  const py::ssize_t tokens = x.shape(0), k = x.shape(1);
  const py::ssize_t tile_rows = (n + pyfast::kTileRows - 1) / pyfast::kTileRows;
  const py::ssize_t tiles = tile_rows * (k / pyfast::kTileColumns);
  require(bitmaps.ndim() == 2 && bitmaps.shape(0) == tiles && bitmaps.shape(1) == pyfast::kTileRows,
          "bitmaps: accepted: [tiles, 16]");
  require(offsets.ndim() == 1 && offsets.shape(0) == tiles + 1 && v.ndim() == 1 && offsets.at(tiles) == v.shape(0),
          "offsets: accepted: [tiles + 1], the last one the number of values");
  const uint64_t* bits = bitmaps.data();
  int64_t stored = 0;
  for (py::ssize_t tile = 0; tile < tiles; ++tile) {
    require(offsets.data()[tile] == stored, "offsets: do not agree with the bits of the bitmaps");
    for (int word = 0; word < pyfast::kTileRows; ++word) stored += __builtin_popcountll(*bits++);
  }
  require(offsets.data()[tiles] == stored, "offsets: do not agree with the bits of the bitmaps");
  const pyfast::Dtype dtype = dtype_of(v, "values");
  py::array y(v.dtype(), std::vector<py::ssize_t>{tokens, n});
  pyfast::BitmapLinearArgs args{};
  args.x = x.data();
  args.values = v.data();
  args.bitmaps = bitmaps.data();
  args.offsets = offsets.data();
  args.tokens = tokens;
  args.k = args.x_stride = k;
  args.out = epilogue(y, n, dtype);
  args.nnz = v.shape(0);
  table.linear[static_cast<int>(dtype)](args, 0, tile_rows);
  return y;
}

const pyfast::BitmapConvertTable& convert_table(const std::string& variant) {
  const pyfast::Isa isa = checked(variant);
#if defined(__x86_64__)
  if (variant == "avx512") return pyfast::kBitmapConvertAvx512;
#endif
  return pyfast::bitmap_convert_table(isa);
}

size_t size_index(const py::array& a, const char* name) {
  const py::ssize_t bytes = a.itemsize();
  require(bytes == 1 || bytes == 2 || bytes == 4,
          (std::string(name) + ": accepted: elements of 1, 2 or 4 bytes").c_str());
  return bytes == 4 ? 2 : static_cast<size_t>(bytes) - 1;
}

py::tuple bitmap_pack(const py::array& dense, const std::string& variant, py::ssize_t room) {
  const pyfast::BitmapConvertTable& table = convert_table(variant);
  const py::array d = contiguous(dense);
  const size_t size = size_index(d, "dense");
  require(d.ndim() == 2 && d.shape(1) == pyfast::kWordColumns, "dense: accepted: [rows, 64]");
  const py::ssize_t rows = d.shape(0);
  py::array_t<uint64_t> words(rows);
  table.scan[size](d.data(), pyfast::kWordColumns, rows, words.mutable_data());
  py::ssize_t stored = 0;
  for (py::ssize_t i = 0; i < rows; ++i) stored += __builtin_popcountll(words.data()[i]);
  require(room >= 0, "room: accepted: 0 or more");
  py::array values(d.dtype(), std::vector<py::ssize_t>{stored + room});
  std::memset(values.mutable_data(), 0, static_cast<size_t>(values.nbytes()));
  table.pack[size](d.data(), pyfast::kWordColumns, rows, words.data(), values.mutable_data());
  return py::make_tuple(words, values);
}

py::array bitmap_expand(const py::array& values, const py::array& bitmaps, const std::string& variant) {
  const pyfast::BitmapConvertTable& table = convert_table(variant);
  const auto words = exactly<uint64_t>(bitmaps, "words: accepted: uint64");
  const py::array v = contiguous(values);
  const size_t size = size_index(v, "values");
  require(words.ndim() == 1 && v.ndim() == 1, "values, words: accepted: [stored], [rows]");
  py::ssize_t stored = 0;
  for (py::ssize_t i = 0; i < words.shape(0); ++i) stored += __builtin_popcountll(words.data()[i]);
  require(stored == v.shape(0), "values: accepted: as many as the words have bits");
  std::vector<char> room(static_cast<size_t>((stored + pyfast::kExpandOverread) * v.itemsize()));
  std::copy_n(static_cast<const char*>(v.data()), v.nbytes(), room.begin());
  py::array dense(v.dtype(), std::vector<py::ssize_t>{words.shape(0), pyfast::kWordColumns});
  table.expand[size](room.data(), words.data(), words.shape(0), dense.mutable_data(), pyfast::kWordColumns);
  return dense;
}

py::array nm_mask(const py::array& scores, py::ssize_t n, py::ssize_t m, const std::string& variant) {
  const pyfast::NmMaskTable& table = pyfast::nm_mask_table(checked(variant));
  const py::array s = contiguous(scores);
  require(s.ndim() == 2, "scores: accepted: a matrix");
  require(1 <= n && n <= m && m <= pyfast::kNmMaskMaxGroup, "n, m: accepted: 1 <= n <= m <= 32");
  py::array_t<bool> mask(std::vector<py::ssize_t>{s.shape(0), s.shape(1)});
  pyfast::NmMaskArgs args{};
  args.scores = s.data();
  args.mask = reinterpret_cast<uint8_t*>(mask.mutable_data());
  args.k = args.score_stride = s.shape(1);
  args.n = n;
  args.m = m;
  table.rows[static_cast<int>(dtype_of(s, "scores"))](args, 0, s.shape(0));
  return mask;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU kernels of pyfast for NumPy arrays; every variant by name, single-threaded, no torch.";
  m.def("variants", &variants, "Names of the variants that this processor can run.");
  m.def("distill_kl", &distill_kl, py::arg("student"), py::arg("teacher"), py::arg("temperature") = 1.0,
        py::arg("teacher_temperature") = py::none(), py::arg("variant") = "serial", py::arg("grad") = true,
        py::arg("divergence") = "forward_kl", py::arg("mix") = 0.5,
        "Divergence of each row and its gradient: (float32 [rows], [rows, V] or [0, 0]).");
  m.def(
      "topk_distill", &topk_distill, py::arg("student"), py::arg("ids"), py::arg("entries"), py::arg("tail") = "bucket",
      py::arg("temperature") = 1.0, py::arg("variant") = "serial", py::arg("grad") = true,
      "Forward KL from a teacher of k words a row, ids int64 and entries float64 [rows, k] (log-probabilities; weights "
      "where tail is sampled), and its gradient: (float32 [rows], [rows, V] or [0, 0]).");
  m.def("sparse24_linear", &sparse24_linear, py::arg("x"), py::arg("values"), py::arg("metadata"),
        py::arg("variant") = "serial", "x [tokens, k] float32 times a 2:4 weight: [tokens, n].");
  m.def("bitmap_linear", &bitmap_linear, py::arg("x"), py::arg("values"), py::arg("bitmaps"), py::arg("offsets"),
        py::arg("n"), py::arg("variant") = "serial", "x [tokens, k] float32 times a bitmap weight: [tokens, n].");
  m.def("bitmap_pack", &bitmap_pack, py::arg("dense"), py::arg("variant") = "serial", py::arg("room") = 0,
        "Words and values of rows of 64 elements of 1, 2 or 4 bytes, and as many zeros behind them as there is room: "
        "(uint64 [rows], [stored + room]).");
  m.def("bitmap_expand", &bitmap_expand, py::arg("values"), py::arg("words"), py::arg("variant") = "serial",
        "The rows of 64 elements that bitmap_pack was given.");
  m.def("nm_mask", &nm_mask, py::arg("scores"), py::arg("n"), py::arg("m"), py::arg("variant") = "serial",
        "Which n of every m consecutive columns have the largest scores [rows, k]: bool [rows, k].");
}
