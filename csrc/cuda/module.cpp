// Module pyfast._cuda (abi3). The ops register themselves from csrc/cuda/<op>.cu when this library is loaded; the
// module itself only says how it was built. It needs the CUDA build of torch and is imported only there.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda_runtime_api.h>

#ifndef PYFAST_VERSION
#define PYFAST_VERSION "unknown"
#endif
#ifndef PYFAST_CUDA_ARCHS
#define PYFAST_CUDA_ARCHS "unknown"
#endif

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  PyObject* toolkit = PyUnicode_FromFormat("%d.%d", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  if (toolkit == nullptr) return nullptr;
  return Py_BuildValue("{s:s,s:N,s:s,s:s}", "architectures", PYFAST_CUDA_ARCHS, "cuda", toolkit, "version",
                       PYFAST_VERSION, "torch_target", "2.11");
}

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(PYFAST_CUDA_ARCHS); }

PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS, "Architectures built, as TORCH_CUDA_ARCH_LIST names them."},
    {"build_info", build_info, METH_NOARGS, "Architectures built, CUDA toolkit, version, torch ABI target."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", "Native CUDA kernels of pyfast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
