// Comparing runs of tokens, which the radix tree does most. The Python twins are in minisgl/core/tokens.py.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace py = pybind11;

namespace {

// A borrowed view of a contiguous one-dimensional int32 buffer (a numpy array, an array.array).
// Python's own call is used because pybind11's buffer_info allocates, which costs more than the
// comparison itself on the short runs of a radix tree.
class Tokens {
  public:
    Tokens(py::handle object, const char *name) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_ND | PyBUF_FORMAT) != 0)
            throw py::error_already_set();
        const char code = view_.format && view_.format[0] ? view_.format[0] : 'B';
        if (view_.ndim != 1 || view_.itemsize != 4 || (code != 'i' && code != 'l')) {
            PyBuffer_Release(&view_);
            throw py::type_error(std::string(name) +
                                 " must be a contiguous one-dimensional int32 array");
        }
    }
    ~Tokens() { PyBuffer_Release(&view_); }
    Tokens(const Tokens &) = delete;
    Tokens &operator=(const Tokens &) = delete;

    const int32_t *data() const { return static_cast<const int32_t *>(view_.buf); }
    py::ssize_t size() const { return view_.len / 4; }

  private:
    Py_buffer view_;
};

// How many leading elements of x[0:n] and y[0:n] are equal.
py::ssize_t equal_run(const int32_t *x, const int32_t *y, py::ssize_t n) {
    constexpr py::ssize_t block = 64;  // memcmp finds the block that differs, the loop the element
    py::ssize_t i = 0;
    while (i + block <= n && std::memcmp(x + i, y + i, block * sizeof(int32_t)) == 0) i += block;
    while (i < n && x[i] == y[i]) ++i;
    return i;
}

py::ssize_t common_prefix(py::handle a, py::ssize_t a_start, py::handle b, py::ssize_t b_start,
                          py::ssize_t limit) {
    const Tokens left(a, "a"), right(b, "b");
    if (a_start < 0 || b_start < 0 || limit < 0)
        throw py::value_error("a_start, b_start and limit must not be negative");
    const py::ssize_t n = std::min({limit, left.size() - a_start, right.size() - b_start});
    return n <= 0 ? 0 : equal_run(left.data() + a_start, right.data() + b_start, n);
}

}  // namespace

PYBIND11_MODULE(core_ops, m) {
    m.def("common_prefix", &common_prefix, py::arg("a"), py::arg("a_start"), py::arg("b"),
          py::arg("b_start"), py::arg("limit"),
          "How many tokens a[a_start:] and b[b_start:] share from their start, at most limit.");
}
