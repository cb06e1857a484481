// The one boundary of the extension: step() takes what elf_rt.sampling.integrator.step_numpy takes and checks the type,
// shape and layout of every array, with the same messages; the code behind it trusts them. The GIL is released while it
// runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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

Shape shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

template <typename T>
void check(const char* name, const py::array& array, const Shape& shape, const char* type, bool written = false) {
  if (shape_of(array) != shape)
    refuse(std::string(name) + " must have shape " + text(shape) + ", got " + text(shape_of(array)));
  if (!(array.flags() & py::array::c_style)) refuse(std::string(name) + " must be C-contiguous");
  if (written && !array.writeable()) refuse(std::string(name) + " must be writable");
  if (!py::isinstance<py::array_t<T>>(array))
    refuse(std::string(name) + " must be " + type + ", got " + std::string(py::str(array.dtype().attr("name"))));
}

int check_rows(const char* name, int64_t count, int most) {
  if (count > most)
    refuse(std::string(name) + " must have at most " + std::to_string(most) + " rows, got " + std::to_string(count));
  return static_cast<int>(count);
}

float* floats(const char* name, py::array array, const Shape& shape) {
  check<float>(name, array, shape, "float32", true);
  return static_cast<float*>(array.mutable_data());
}

const float* const_floats(const char* name, const py::array& array, const Shape& shape) {
  check<float>(name, array, shape, "float32");
  return static_cast<const float*>(array.data());
}

MaybeArray maybe(const py::handle& slot, const char* name) {
  const py::object value = slot.attr(name);
  return value.is_none() ? MaybeArray() : MaybeArray(value.cast<py::array>());
}

// What a SlotStep of Python holds, checked. The arrays outlive the call: the caller's list holds on to them.
elf::SlotStep read_slot(const py::handle& slot, const Shape& full) {
  elf::SlotStep s{};
  s.z = floats("z", slot.attr("z").cast<py::array>(), full);
  s.x_last = floats("x_last", slot.attr("x_last").cast<py::array>(), full);
  const float* coef = const_floats("coef", slot.attr("coef").cast<py::array>(), {5});
  s.coef = {coef[0], coef[1], coef[2], coef[3], coef[4]};
  const MaybeArray x_rows = maybe(slot, "x_rows"), weights = maybe(slot, "weights");
  if (x_rows.has_value() != weights.has_value()) refuse("x_rows and weights go together");
  if (x_rows) {
    s.num_outputs = check_rows("x_rows", x_rows->ndim() ? x_rows->shape(0) : 0, elf::MAX_ROWS);
    s.x_rows = const_floats("x_rows", *x_rows, {s.num_outputs, full[0], full[1]});
    std::copy_n(const_floats("weights", *weights, {s.num_outputs}), s.num_outputs, s.weights);
  }
  const py::object noise = slot.attr("noise");
  if (py::isinstance<py::array>(noise)) {
    s.noise = const_floats("noise", noise.cast<py::array>(), full);
  } else {
    s.seed = noise.attr("seed").cast<uint64_t>();
    s.noise_index = noise.attr("index").cast<uint32_t>();
  }
  const MaybeArray source = maybe(slot, "source"), mask = maybe(slot, "mask");
  if (source.has_value() != mask.has_value()) refuse("source and mask go together");
  if (source) {
    s.source = const_floats("source", *source, full);
    check<bool>("mask", *mask, {full[0]}, "bool");
    s.mask = static_cast<const uint8_t*>(mask->data());
  }
  const py::sequence rows = slot.attr("rows");
  s.num_rows = check_rows("rows", static_cast<int64_t>(py::len(rows)), elf::MAX_ROWS + 1);  // one of them a draft
  for (int k = 0; k < s.num_rows; ++k) s.rows |= rows[k].attr("flags").cast<uint32_t>() << (elf::ROW_BITS * k);
  const Shape next{s.num_rows, full[0], full[1]};
  if (s.num_rows) s.next_z = floats("next_z", slot.attr("next_z").cast<py::array>(), next);
  if (const MaybeArray next_x_prev = maybe(slot, "next_x_prev"); next_x_prev && s.num_rows)
    s.next_x_prev = floats("next_x_prev", *next_x_prev, next);
  return s;
}

void step(const py::sequence& slots) {
  if (!py::len(slots)) return;
  const py::array first = slots[0].attr("z").cast<py::array>();
  if (first.ndim() != 2) refuse("z must have shape (L, C), got " + text(shape_of(first)));
  const Shape full = shape_of(first);
  std::vector<elf::SlotStep> steps;
  steps.reserve(py::len(slots));
  for (const py::handle& slot : slots) steps.push_back(read_slot(slot, full));

  py::gil_scoped_release release;
  elf::run_step(steps, full[0], full[1]);
}

}  // namespace

PYBIND11_MODULE(_integrator, m) {
  m.doc() = "The integrator step in C++; see elf_rt.sampling.integrator.";
  m.def("step", &step, py::arg("slots"));
  m.def("set_num_threads", &elf::set_num_threads, py::arg("count"),
        "Threads that one step may use, the calling one included.");
}
