// Conversions between C++ and Python with the limited C API, for csrc/module.cpp.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace seqkernels::python {

struct Release {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Object = std::unique_ptr<PyObject, Release>;  // an owned reference

struct Error {};  // thrown when a Python exception is set

// Takes a new reference from the C API, where null means that an exception is set.
inline Object checked(PyObject* object) {
  if (object == nullptr) throw Error{};
  return Object(object);
}

[[noreturn]] inline void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw Error{};
}

// ---- values of Python

inline Object to_python(Object object) { return object; }
inline Object to_python(bool value) { return checked(PyBool_FromLong(value)); }
inline Object to_python(int64_t value) { return checked(PyLong_FromLongLong(value)); }
inline Object to_python(int value) { return checked(PyLong_FromLong(value)); }
inline Object to_python(const std::string& text) {
  return checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}
inline Object to_python(const char* text) { return to_python(std::string(text)); }

template <class Value>
Object to_python(const std::vector<Value>& values) {
  Object list = checked(PyList_New(0));
  for (const Value& value : values) {
    if (PyList_Append(list.get(), to_python(value).get()) != 0) throw Error{};
  }
  return list;
}

template <class Value, size_t count>
Object to_python(const std::array<Value, count>& values) {  // a tuple
  return checked(PySequence_Tuple(to_python(std::vector<Value>(values.begin(), values.end())).get()));
}

class Dict {
 public:
  template <class Value>
  void set(const char* key, Value&& value) {
    if (PyDict_SetItemString(dict_.get(), key, to_python(std::forward<Value>(value)).get()) != 0) throw Error{};
  }

 private:
  friend Object to_python(const Dict& value) {
    Py_IncRef(value.dict_.get());
    return Object(value.dict_.get());
  }
  Object dict_ = checked(PyDict_New());
};

// ---- arguments of a call

// Arguments in the order in which they are read, each given by position or by name.
class Arguments {
 public:
  Arguments(PyObject* positional, PyObject* named) : positional_(positional), named_(named) {}

  template <class Value>
  Value read(const char* name) {
    PyObject* const given = next(name);
    if (given == nullptr) raise(PyExc_TypeError, std::string("argument ") + name + " is missing");
    return convert<Value>(name, given);
  }
  template <class Value>
  Value read(const char* name, Value otherwise) {
    PyObject* const given = next(name);
    return given == nullptr ? otherwise : convert<Value>(name, given);
  }
  // Raises TypeError if the call has arguments that were not read.
  void finish() const {
    const int64_t given = PyTuple_Size(positional_) + (named_ == nullptr ? 0 : PyDict_Size(named_));
    if (given != found_) raise(PyExc_TypeError, std::to_string(given - found_) + " arguments are unknown");
  }

 private:
  PyObject* next(const char* name) {  // borrowed, or null
    const Py_ssize_t at = read_++;
    PyObject* given = at < PyTuple_Size(positional_) ? PyTuple_GetItem(positional_, at) : nullptr;
    if (given == nullptr && named_ != nullptr) given = PyDict_GetItemString(named_, name);
    found_ += given != nullptr;
    return given;
  }

  [[noreturn]] static void refuse(const char* name, const char* wanted, PyObject* given) {
    PyErr_Clear();
    const Object type = checked(PyObject_Str(reinterpret_cast<PyObject*>(Py_TYPE(given))));
    raise(PyExc_TypeError, std::string(name) + " must be " + wanted + ", got " + text_of(type.get()));
  }

  static std::string text_of(PyObject* string) {
    Py_ssize_t size = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(string, &size);
    if (text == nullptr) throw Error{};
    return {text, static_cast<size_t>(size)};
  }

  template <class Value>
  static Value convert(const char* name, PyObject* given) {
    if constexpr (std::is_same_v<Value, bool>) {
      if (!PyBool_Check(given)) refuse(name, "a bool", given);
      return given == Py_True;
    } else if constexpr (std::is_integral_v<Value>) {
      const long long value = PyLong_AsLongLong(given);
      if (value == -1 && PyErr_Occurred() != nullptr) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) refuse(name, "an int", given);
        throw Error{};  // OverflowError
      }
      return static_cast<Value>(value);
    } else if constexpr (std::is_same_v<Value, std::string>) {
      if (!PyUnicode_Check(given)) refuse(name, "a str", given);
      return text_of(given);
    } else {
      static_assert(std::is_same_v<Value, std::vector<std::string>>);
      if (PyUnicode_Check(given) || !PySequence_Check(given)) refuse(name, "a sequence of str", given);
      Value values;
      for (Py_ssize_t i = 0, size = PySequence_Size(given); i < size; ++i) {
        values.push_back(convert<std::string>(name, checked(PySequence_GetItem(given, i)).get()));
      }
      return values;
    }
  }

  PyObject *positional_, *named_;
  Py_ssize_t read_ = 0;
  int64_t found_ = 0;
};

// ---- functions

// A function of Python that calls `function`, of Arguments&.
template <auto function>
PyObject* call(PyObject*, PyObject* positional, PyObject* named) noexcept {
  try {
    Arguments arguments(positional, named);
    Object result = to_python(function(arguments));
    arguments.finish();
    return result.release();
  } catch (const Error&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <auto function>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<function>)),
          METH_VARARGS | METH_KEYWORDS, nullptr};
}

}  // namespace seqkernels::python
