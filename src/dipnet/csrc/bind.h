// The parts of the Python module dipnet._native. Argument shapes are checked in them, the work is
// done elsewhere.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace nb = nanobind;

// An array of any shape, in C order, that is not copied.
template <typename T>
using Rows = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

void bind_cache(nb::module_& m);
void bind_engine(nb::module_& m);
void bind_reader(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_select(nb::module_& m);
void bind_store(nb::module_& m);
