// The one boundary of the extension: step() takes what elf_rt.sampling.integrator.step_numpy takes and checks every array's
// type, shape and layout, with the same messages; the code behind it trusts them. The GIL is released while it runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "host_step.h"
#include "integrator.h"

namespace py = pybind11;

namespace {

using Shape = std::vector<int64_t>;
using MaybeArray = std::optional<py::array>;

[[noreturn]] void refuse(const std::string& message) {
  py::set_error(py::module_::import("elf_rt.errors").attr("InputError"), message.c_str());
  throw py::error_already_set();
}

std::string text(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

std::string type_name(const py::array& array) { return py::str(array.dtype().attr("name")); }

bool has_type(const py::array& array, char kind, int64_t bytes) {
  const char order = array.dtype().byteorder();
  return array.dtype().kind() == kind && array.itemsize() == bytes && (order == '=' || order == '|');
}

Shape shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

void check_layout(const char* name, const py::array& array, const Shape& shape, bool written) {
  if (shape_of(array) != shape)
    refuse(std::string(name) + " must have shape " + text(shape) + ", got " + text(shape_of(array)));
  if (!(array.flags() & py::array::c_style)) refuse(std::string(name) + " must be C-contiguous");
  if (written && !array.writeable()) refuse(std::string(name) + " must be writable");
}

void check(const char* name, const py::array& array, const Shape& shape, const char* type, char kind, int64_t bytes,
           bool written = false) {
  check_layout(name, array, shape, written);
  if (!has_type(array, kind, bytes))
    refuse(std::string(name) + " must be " + type + ", got " + type_name(array));
}

void check_rows(const char* name, int64_t count) {
  if (count > elf::MAX_ROWS)
    refuse(std::string(name) + " must have at most " + std::to_string(elf::MAX_ROWS) + " guidance rows, got " +
           std::to_string(count));
}

float* floats(const char* name, py::array& array, const Shape& shape) {
  check(name, array, shape, "float32", 'f', 4, true);
  return static_cast<float*>(array.mutable_data());
}

const float* const_floats(const char* name, const py::array& array, const Shape& shape) {
  check(name, array, shape, "float32", 'f', 4);
  return static_cast<const float*>(array.data());
}

elf::NetworkTensor network_tensor(const char* name, const MaybeArray& array, int64_t rows, const Shape& full,
                                  bool written) {
  if (!array) return {};
  check_layout(name, *array, {rows, full[0], full[1], full[2]}, written);
  elf::NetworkTensor tensor{const_cast<void*>(array->data()), elf::NetworkType::float32, static_cast<int>(rows)};
  if (has_type(*array, 'f', 2))
    tensor.type = elf::NetworkType::float16;
  else if (has_type(*array, 'u', 2))
    tensor.type = elf::NetworkType::bfloat16;
  else if (!has_type(*array, 'f', 4))
    refuse(std::string(name) + " must be float32, float16 or uint16, got " + type_name(*array));
  return tensor;
}

void step(py::array z, py::array x_last, const MaybeArray& x_rows, const MaybeArray& weights, const py::array& coef,
          const py::object& noise, const MaybeArray& source, const MaybeArray& mask, const MaybeArray& next_z,
          const MaybeArray& next_x_prev, const py::sequence& rows) {
  if (z.ndim() != 3) refuse("z must have shape (B, L, C), got " + text(shape_of(z)));
  if (x_rows.has_value() != weights.has_value()) refuse("x_rows and weights go together");
  if (source.has_value() != mask.has_value()) refuse("source and mask go together");
  const Shape full = shape_of(z);
  elf::Step s{};
  s.batch = full[0], s.length = full[1], s.width = full[2];
  s.z = floats("z", z, full);
  s.x_last = floats("x_last", x_last, full);
  s.coef = const_floats("coef", coef, {s.batch, 5});
  if (x_rows) {
    const int64_t count = x_rows->ndim() ? x_rows->shape(0) : 0;
    check_rows("x_rows", count);
    s.x_rows = network_tensor("x_rows", x_rows, count, full, false);
    s.weights = const_floats("weights", *weights, {count, s.batch});
  }
  if (py::isinstance<py::array>(noise)) {
    s.noise = const_floats("noise", noise.cast<py::array>(), full);
  } else if (!noise.is_none()) {
    const py::array seeds = noise.attr("seeds");
    check("noise.seeds", seeds, {s.batch}, "uint64", 'u', 8);
    s.seeds = static_cast<const uint64_t*>(seeds.data());
    s.noise_index = noise.attr("index").cast<uint32_t>();
  }
  if (source) {
    s.source = const_floats("source", *source, full);
    check("mask", *mask, {s.batch, s.length}, "bool", 'b', 1);
    s.mask = static_cast<const uint8_t*>(mask->data());
  }
  bool sees_source[elf::MAX_ROWS], sees_prev[elf::MAX_ROWS];
  const int64_t num_rows = static_cast<int64_t>(py::len(rows));
  check_rows("rows", num_rows);
  for (int64_t k = 0; k < num_rows; ++k) {
    const py::object row = rows[k];
    sees_source[k] = row.attr("sees_source").cast<bool>();
    sees_prev[k] = row.attr("sees_prev").cast<bool>();
  }
  s.sees_source = sees_source, s.sees_prev = sees_prev;
  s.next_z = network_tensor("next_z", next_z, num_rows, full, true);
  s.next_x_prev = network_tensor("next_x_prev", next_x_prev, num_rows, full, true);

  py::gil_scoped_release release;
  elf::run_step(s);
}

}  // namespace

PYBIND11_MODULE(_integrator, m) {
  m.doc() = "The integrator step in C++; see elf_rt.sampling.integrator.";
  m.def("step", &step, py::arg("z"), py::arg("x_last"), py::kw_only(), py::arg("x_rows") = py::none(),
        py::arg("weights") = py::none(), py::arg("coef"), py::arg("noise") = py::none(), py::arg("source") = py::none(),
        py::arg("mask") = py::none(), py::arg("next_z") = py::none(), py::arg("next_x_prev") = py::none(),
        py::arg("rows") = py::tuple());
  m.def("set_num_threads", &elf::set_num_threads, py::arg("count"),
        "Threads that one step may use, the calling one included.");
}
