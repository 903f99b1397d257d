// Module pyfast._C (abi3). The ops register themselves from csrc/cpu/<op>.cpp when this library is loaded;
// the module itself only says how it was built and which ISA is in use.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdexcept>

#include "cpu/dense_linear.h"
#include "cpu/isa.h"
#include "cpu/reuse.h"
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

PyMethodDef methods[] = {
    {"active_isa", active_isa, METH_NOARGS, "Name of the ISA in use."},
    {"set_active_isa", set_active_isa, METH_O, "Use this ISA from now on, in the whole process."},
    {"supported_isas", supported_isas, METH_NOARGS, "Names of the built ISAs that this processor runs."},
    {"build_info", build_info, METH_NOARGS, "Compiler, ISAs built, version, torch ABI target."},
    {"has_vbmi2", has_vbmi2, METH_NOARGS, "Whether this processor has AVX-512 VBMI2: the look-up of bitmap_linear."},
    {"has_avx512_bf16", has_avx512_bf16, METH_NOARGS,
     "Whether it has AVX-512 BF16 besides: bitmap_linear of bfloat16."},
    {"is_intel", is_intel, METH_NOARGS, "Whether this is a processor of Intel's."},
    {"multiply_by_onednn", multiply_by_onednn, METH_O,
     "Whether dense products of float32 are oneDNN's, see dense_linear.h."},
    {"few_tokens", few_tokens, METH_NOARGS, "Tokens up to which a product reads a weight as it is stored."},
    {"release_memory", release_memory, METH_NOARGS, "Frees the output kept for reuse; returns its bytes."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Native CPU kernels of pyfast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
