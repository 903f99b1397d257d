// Module pyfast._C (abi3). The ops register themselves from csrc/cpu/<op>.cpp when this library is loaded; the module
// itself says how it was built and which ISA is in use, and serves a product once more without the dispatcher (Served).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/dense_linear.h"
#include "cpu/isa.h"
#include "cpu/reuse.h"
#include "cpu/served.h"
#include "cpu/sparse_driver.h"

#ifndef PYFAST_VERSION
#define PYFAST_VERSION "unknown"
#endif

#if defined(__clang__)
#define PYFAST_COMPILER __VERSION__
#else
#define PYFAST_COMPILER "GCC " __VERSION__
#endif

namespace {

PyObject* raise(const std::exception& error) {
  PyErr_SetString(PyExc_ValueError, error.what());
  return nullptr;
}

PyObject* active_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(pyfast::kIsaNames[static_cast<int>(pyfast::active_isa())]);
  } catch (const std::invalid_argument& error) {
    return raise(error);
  }
}

PyObject* set_active_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  PyObject* result = nullptr;
  try {
    pyfast::set_active_isa(PyBytes_AsString(bytes));
    result = Py_NewRef(Py_None);
  } catch (const std::invalid_argument& error) {
    raise(error);
  }
  Py_DecRef(bytes);
  return result;
}

PyObject* supported_isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (int i = 0; list != nullptr && i < pyfast::kIsaCount; ++i) {
    if (!pyfast::isa_supported(static_cast<pyfast::Isa>(i))) continue;
    PyObject* name = PyUnicode_FromString(pyfast::kIsaNames[i]);
    if (name == nullptr || PyList_Append(list, name) != 0) {
      Py_DecRef(list);
      list = nullptr;
    }
    Py_XDECREF(name);
  }
  return list;
}

PyObject* build_info(PyObject*, PyObject*) {
#if defined(__x86_64__)
  constexpr const char* built = "serial avx2 avx512";
#else
  constexpr const char* built = "serial";
#endif
  return Py_BuildValue("{s:s,s:s,s:s,s:s}", "compiler", PYFAST_COMPILER, "isas", built, "version", PYFAST_VERSION,
                       "torch_target", "2.11");
}

PyObject* release_memory(PyObject*, PyObject*) { return PyLong_FromLongLong(pyfast::release_memory()); }

PyObject* kept_memory(PyObject*, PyObject*) { return PyLong_FromLongLong(pyfast::kept_memory()); }

PyObject* has_vbmi2(PyObject*, PyObject*) { return PyBool_FromLong(pyfast::has_vbmi2()); }

PyObject* has_avx512_bf16(PyObject*, PyObject*) { return PyBool_FromLong(pyfast::has_avx512_bf16()); }

PyObject* is_intel(PyObject*, PyObject*) { return PyBool_FromLong(pyfast::is_intel()); }

PyObject* multiply_by_onednn(PyObject*, PyObject* chosen) {
  const int yes = PyObject_IsTrue(chosen);
  if (yes < 0) return nullptr;
  pyfast::multiply_by_onednn(yes != 0);
  return Py_NewRef(Py_None);
}

PyObject* few_tokens(PyObject*, PyObject*) {
  try {
    return PyLong_FromLongLong(pyfast::few_tokens());
  } catch (const std::invalid_argument& error) {
    return raise(error);
  }
}

// _C.Served: a pyfast::Served that Python holds.
struct ServedObject {
  PyObject_HEAD const pyfast::Served* served;
};

PyTypeObject* served_type = nullptr;  // of the one module of this process

void served_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<ServedObject*>(self)->served;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DecRef(reinterpret_cast<PyObject*>(type));
}

PyObject* served_run(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "run: accepted: the addresses of x, mul (or 0) and y");
    return nullptr;
  }
  void* addresses[3];
  for (int i = 0; i < 3; ++i) addresses[i] = PyLong_AsVoidPtr(args[i]);
  if (PyErr_Occurred() != nullptr) return nullptr;
  const pyfast::Served* served = reinterpret_cast<ServedObject*>(self)->served;
  std::string failure;
  PyThreadState* thread = PyEval_SaveThread();
  bool ran = false;
  try {
    ran = served->current();
    if (ran) served->run(addresses[0], addresses[1], addresses[2]);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  PyEval_RestoreThread(thread);
  if (!failure.empty()) {
    PyErr_SetString(PyExc_RuntimeError, failure.c_str());
    return nullptr;
  }
  return PyBool_FromLong(ran);
}

PyMethodDef served_methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(served_run)), METH_FASTCALL,
     "Multiplies x and writes y, by their addresses: contiguous, of the recorded call's shapes and dtype. False, and y "
     "untouched, where what the call read lies elsewhere now or the number of threads is another."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot served_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(served_dealloc)},
    {Py_tp_methods, served_methods},
    {0, nullptr},
};

PyType_Spec served_spec = {"pyfast._C.Served", sizeof(ServedObject), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, served_slots};

PyObject* record(PyObject*, PyObject*) {
  pyfast::record(true);
  return Py_NewRef(Py_None);
}

PyObject* recorded(PyObject*, PyObject*) {
  std::unique_ptr<const pyfast::Served> served = pyfast::take_recorded();
  if (served == nullptr) return Py_NewRef(Py_None);
  const auto alloc = reinterpret_cast<allocfunc>(PyType_GetSlot(served_type, Py_tp_alloc));
  PyObject* object = alloc(served_type, 0);
  if (object != nullptr) reinterpret_cast<ServedObject*>(object)->served = served.release();
  return object;
}

PyMethodDef methods[] = {
    {"active_isa", active_isa, METH_NOARGS, "Name of the ISA in use."},
    {"set_active_isa", set_active_isa, METH_O, "Use this ISA from now on, in the whole process."},
    {"supported_isas", supported_isas, METH_NOARGS, "Names of the built ISAs that this processor runs."},
    {"build_info", build_info, METH_NOARGS, "Compiler, ISAs built, version, torch ABI target."},
    {"has_vbmi2", has_vbmi2, METH_NOARGS, "Whether this processor has AVX-512 VBMI2: the look-up of bitmap_linear."},
    {"has_avx512_bf16", has_avx512_bf16, METH_NOARGS,
     "Whether it has AVX-512 BF16 besides: bfloat16 multiplied as it is."},
    {"is_intel", is_intel, METH_NOARGS, "Whether this is a processor of Intel's."},
    {"multiply_by_onednn", multiply_by_onednn, METH_O,
     "Whether dense products of float32 are oneDNN's, see dense_linear.h."},
    {"few_tokens", few_tokens, METH_NOARGS, "Tokens up to which a product reads a weight as it is stored."},
    {"record", record, METH_NOARGS, "Keeps what serves the next sparse product of this thread, for recorded()."},
    {"recorded", recorded, METH_NOARGS, "What served it, a Served, or None; ends the recording."},
    {"kept_memory", kept_memory, METH_NOARGS, "Bytes of large memory kept for reuse."},
    {"release_memory", release_memory, METH_NOARGS, "Frees them; returns how many there were."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Native CPU kernels of pyfast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  served_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&served_spec));
  return served_type == nullptr ? nullptr : PyModule_Create(&module);
}
